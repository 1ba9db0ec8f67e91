"""MLflow's Model Registry: picks go in as versions with an alias each, and policies come out by those names."""

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from ..policies import BlockPolicy
from .config import Config, ConfigError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# one try: the outbox tries again by itself, whoever asks for a policy is told at once; MLflow would wait for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


def registered_model(config: Config) -> str:
    """Under what name the picks are registered; a name must be free of what separates it from version and alias."""
    return config.mlflow.registered_model or re.sub("[/:@]+", "-", f"{config.mlflow.experiment}-{config.name}")


def register(client: Any, name: str, run: str, picks: dict[str, str]) -> None:
    """Each pick as a version, known again by where its file lies, and its alias; those of old picks go."""
    if not client.search_registered_models(f"name = '{name}'"):
        if not picks:
            return
        client.create_registered_model(name)
    versions = {v.source: v for v in client.search_model_versions(f"name = '{name}'")}
    aliases: dict[str, str] = client.get_registered_model(name).aliases
    for alias, number in aliases.items():
        mine = any(str(v.version) == str(number) and v.run_id == run for v in versions.values())
        if mine and alias not in picks:
            client.delete_registered_model_alias(name, alias)
    for alias, text in picks.items():
        place = f"picks/{alias}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        source = f"runs:/{run}/{place}"
        if source not in versions:
            client.log_text(run, text, f"{place}/policy.json")
            tags = {"policy_digest": BlockPolicy.model_validate_json(text).digest, "pick": alias}
            versions[source] = client.create_model_version(name, source, run, tags)
        client.set_registered_model_alias(name, alias, versions[source].version)


def registered_policy(reference: str, uri: str | None) -> BlockPolicy:
    """The policy of `models:/NAME@ALIAS` or `models:/NAME/VERSION` at a tracking URI; ConfigError where none is."""
    asked = re.fullmatch(r"models:/([^/:@]+)(?:@([^/:@]+)|/(\d+))", reference)
    if not asked:
        raise ConfigError(f"the policy is {reference!r}; accepted: a file, models:/NAME@ALIAS or models:/NAME/VERSION.")
    if not uri:
        raise ConfigError(f"the policy is {reference!r}, which needs --mlflow-uri or MLFLOW_TRACKING_URI.")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ConfigError(f"--mlflow-uri is {uri!r}; there is no such file.")  # MLflow would make one
    import mlflow.artifacts

    logging.getLogger("alembic").setLevel(logging.ERROR)
    name, alias, version = asked.groups()
    with tempfile.TemporaryDirectory() as folder:
        try:
            client = mlflow.MlflowClient(uri)
            version = version or client.get_model_version_by_alias(name, alias).version
            # of models:/ itself, MLflow would ask the registry of its global state
            place = client.get_model_version_download_uri(name, version)
            found = mlflow.artifacts.download_artifacts(place, dst_path=folder, tracking_uri=uri)
        except Exception as error:  # of MLflow, the database, the network or the store of artifacts
            sentence = " ".join(str(error).split())[:200]
            raise ConfigError(f"the policy {reference!r} cannot be had from {uri!r}: {sentence}") from None
        return BlockPolicy.load(Path(found) / "policy.json")
