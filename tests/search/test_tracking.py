"""MLflow: every record arrives once, whatever dies in between, and what was registered can be loaded."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
import pytest
from blocktune.evaluators import Prompt
from blocktune.policies import BlockPolicy, ModelIdentity, Rule, ScaleText, Skip
from blocktune.search import tracking
from blocktune.search.config import Config, load_config
from blocktune.search.registry import registered_model, registered_policy
from blocktune.search.tracking import Record, Tracker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from .conftest import HANG, until

MODEL = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=12, fingerprint="0" * 64)
PROMPTS = {
    split: tuple(Prompt(f"a {shape}", "single", seed) for shape in ("ring", "cross"))
    for seed, split in enumerate(("search", "confirm"))
}


def policy(name: str, scale: float = 1.5) -> BlockPolicy:
    rules = (Rule(blocks=[3], action=Skip()), Rule(blocks=[4], action=ScaleText(operand="value", scale=scale)))
    return BlockPolicy(name=name, model=MODEL, rules=rules)


def a_trial(tracker: Tracker, number: int) -> None:
    tracker.trial(number, datetime.now(), {"band": number}, {"shapes": number / 8}, policy(f"trial {number}"), None)


def begin(tracker: Tracker, **more: Any) -> None:
    sources = {"prompts.search": "reference", "prompts.confirm": "reference"}
    tracker.begin(sources | more, {"device": "a CPU"}, PROMPTS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


class Server:
    """A real tracking server on one store, which may be killed and started again."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        until(lambda: answers(f"{self.uri}/health"), "the tracking server")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(HANG)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all: MLflow takes seconds to make one."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def test_a_kill_amid_the_making_of_the_database_costs_no_record(tmp_path: Path) -> None:
    """Tables are made beside: what a killed process left there is made again, and `mlflow.db` is whole or not there."""
    (tmp_path / "mlflow.db.new").write_bytes(b"torn")
    tracker = Tracker(load_config(None, []), tmp_path, "again")
    a_trial(tracker, 0)
    until(lambda: bool(tracker.run_id), "the database")
    tracker.close()
    assert not list(tmp_path.glob("mlflow.db.new*"))
    assert not (tmp_path / "outbox.jsonl").exists()
    runs = client(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])
    assert sorted(run.data.tags.get("trial", "") for run in runs) == ["", "0"]


def config_for(uri: str, *more: str) -> Config:
    return load_config(None, [f"mlflow.uri={uri}", *more])


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri, uri)


def children(uri: str, run_id: str) -> dict[int, list[Any]]:
    """The runs under the parent, by trial."""
    server = client(uri)
    parent = server.get_run(run_id)
    found: dict[int, list[Any]] = {}
    for run in server.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'"):
        found.setdefault(int(run.data.tags["trial"]), []).append(run)
    return found


# A search over a server that is killed in its middle


def complete(run: Path) -> list[Any]:
    if not (run / "study.db").exists():
        return []
    study = optuna.load_study(study_name="blocktune", storage=f"sqlite:///{run / 'study.db'}")
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def test_a_server_that_is_killed_loses_nothing(
    new_world: Callable[..., Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    world = new_world(trials=9)
    run = world.folder / "run"
    driver = world.start("search", world.config, "--out", run, "--set", f"mlflow.uri={server.uri}")
    log = world.folder / "stderr.txt"
    until(lambda: "search 1/9" in log.read_text() or driver.poll() is not None, "a trial")
    server.kill()
    before = len(complete(run))
    until(lambda: len(complete(run)) >= before + 2 or driver.poll() is not None, "two trials without a server", 60)
    assert driver.poll() is None, log.read_text()
    assert (run / "outbox.jsonl").exists()
    server.start()
    assert driver.wait(HANG) == 0, log.read_text()
    assert "MLflow does not record" in log.read_text()
    outbox = run / "outbox.jsonl"
    assert not outbox.exists()
    # what the end could not send either, --resume of a finished search sends
    outbox.write_text(json.dumps(asdict(Record(0, metrics={"hypervolume": 1.0}, step=99))))
    world.run("search", "--resume", "--out", run)
    assert not outbox.exists()

    parent = client(server.uri).get_run(json.loads((run / "run.json").read_text())["mlflow_run_id"])
    found = children(server.uri, parent.info.run_id)
    assert sorted(found) == list(range(9))
    for trial in complete(run):
        (child,) = found[trial.number]
        assert child.info.status == "FINISHED"
        assert child.data.metrics.items() >= trial.user_attrs["metrics"].items()
        assert child.info.start_time == pytest.approx(trial.datetime_start.timestamp() * 1000, abs=1)
    assert parent.info.status == "FINISHED"
    hypervolume = client(server.uri).get_metric_history(parent.info.run_id, "hypervolume")
    assert sorted(m.step for m in hypervolume) == [*range(9), 99]
    assert parent.data.metrics["images"] == 3 * sum("same_as" not in t.user_attrs for t in complete(run))
    assert parent.data.metrics["worker_seconds"] > 0
    assert "gpu_seconds" not in parent.data.metrics or parent.data.metrics["gpu_seconds"] > 0
    assert any(name.startswith("system/") for name in parent.data.metrics)
    assert {"torch", "optuna", "mlflow", "device", "fingerprint", "driver"} <= parent.data.tags.keys()
    assert {"search.seed", "prompts.search_sha256"} <= parent.data.params.keys()
    assert {d.dataset.name for d in parent.inputs.dataset_inputs} == {"search-prompts", "confirm-prompts"}
    kept = {file.path for file in client(server.uri).list_artifacts(parent.info.run_id)}
    assert {"front.json", "front.png", "compare.png", "report.md", "report.html", "confirmed.json", "policies"} <= kept


# Records, without a search


def test_what_another_process_could_not_send_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store answers only after the first process has ended; its last line was torn by a kill."""
    monkeypatch.setattr(tracking, "_MOMENT", 0.5)
    place = tmp_path / "later"
    config, search = config_for(f"sqlite:///{place / 'mlflow.db'}"), uuid4().hex
    place.write_text("not a folder yet")
    first = Tracker(config, tmp_path, search)
    begin(first)
    for number in range(3):
        a_trial(first, number)
    first.close()
    assert first.run_id == ""
    outbox = tmp_path / "outbox.jsonl"
    outbox.write_text(outbox.read_text() + '\n{"stamp": 17, "tri')
    place.unlink()
    place.mkdir()
    second = Tracker(config, tmp_path, search)
    a_trial(second, 3)
    second.finish("FINISHED")
    second.close()
    assert not outbox.exists()
    found = children(tracking.tracking_uri(config, tmp_path), second.run_id)
    assert {number: len(runs) for number, runs in found.items()} == {0: 1, 1: 1, 2: 1, 3: 1}
    assert {run.data.metrics["shapes"] for (run,) in found.values()} == {0, 1 / 8, 2 / 8, 3 / 8}


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(sent=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=3))
def test_a_record_that_is_sent_twice_is_there_once(store: str, tmp_path: Path, sent: list[list[int]]) -> None:
    """Each inner list is a process, which tells of these trials."""
    search = uuid4().hex
    for numbers in sent:
        tracker = Tracker(config_for(store), tmp_path, search)
        begin(tracker)
        for number in numbers:
            a_trial(tracker, number)
        lines = (tmp_path / "outbox.jsonl").read_text() if (tmp_path / "outbox.jsonl").exists() else ""
        tracker.close()
        (tmp_path / "outbox.jsonl").write_text(lines)  # a kill came after sending and before forgetting
    last = Tracker(config_for(store), tmp_path, search)
    last.finish("FINISHED")
    last.close()
    found = children(store, last.run_id)
    assert found.keys() == {number for numbers in sent for number in numbers}
    assert all(len(runs) == 1 for runs in found.values())
    assert len(client(store).get_run(last.run_id).inputs.dataset_inputs) == 2


def test_a_resume_with_another_budget_is_told_in_tags(store: str, tmp_path: Path) -> None:
    many = {f"field.{i}": i for i in range(150)}
    search = uuid4().hex
    for trials in (44, 88):
        tracker = Tracker(config_for(store), tmp_path, search)
        begin(tracker, **many, **{"search.trials": trials})
        tracker.progress(trials, {"hypervolume": trials / 2})
        tracker.finish("FINISHED", tables={"front": [{"candidate": f"trial {trials}", "speedup": 1.5}]})
        tracker.close()
    run = client(store).get_run(tracker.run_id)
    assert run.data.params["search.trials"] == "44"
    assert run.data.tags["search.trials"] == "88"
    assert len(run.data.params) == 150 + 1 + 4
    assert [(m.step, m.value) for m in client(store).get_metric_history(run.info.run_id, "hypervolume")] == [
        (44, 22), (88, 44),
    ]  # fmt: skip
    table = Path(client(store).download_artifacts(run.info.run_id, "front.json", str(tmp_path)))
    assert json.loads(table.read_text()) == {"columns": ["candidate", "speedup"], "data": [["trial 88", 1.5]]}
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "front.json", "type": "table"}]


def test_a_record_that_is_refused_holds_up_no_other(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(config_for(store), tmp_path, uuid4().hex)
    tracker.progress(0, {"no (such) name": 1.0})
    a_trial(tracker, 0)
    tracker.close()
    assert "MLflow refused a record" in caplog.text
    assert list(children(store, tracker.run_id)) == [0]


# The Model Registry


def register(tmp_path: Path, config: Config, search: str, picks: dict[str, BlockPolicy]) -> str:
    files = {}
    for alias, pick in picks.items():
        pick.save(files.setdefault(alias, tmp_path / f"{alias}.json"))
    tracker = Tracker(config, tmp_path, search)
    tracker.finish("FINISHED", picks=files)
    tracker.close()
    return registered_model(config)


def test_picks_are_versions_with_aliases(store: str, tmp_path: Path) -> None:
    config, search = config_for(store, "name=picked"), uuid4().hex
    name = register(tmp_path, config, search, {})
    assert not client(store).search_registered_models(f"name = '{name}'"), "no picks, nothing registered"
    picks = {alias: policy(alias) for alias in ("quality", "balanced", "fast")}
    assert register(tmp_path, config, search, picks) == "blocktune-picked"
    for alias, pick in picks.items():
        assert registered_policy(f"models:/{name}@{alias}", store) == pick
    fewer = {"balanced": policy("balanced", 1.7), "fast": picks["fast"]}
    register(tmp_path, config, search, fewer)
    aliases = client(store).get_registered_model(name).aliases
    assert set(aliases) == {"balanced", "fast"}, "what did not hold any more is no pick"
    assert len(client(store).search_model_versions(f"name = '{name}'")) == 4, "the same pick is the same version"
    assert registered_policy(f"models:/{name}@balanced", store) == fewer["balanced"]
    assert registered_policy(f"models:/{name}/1", store).name in picks


@pytest.mark.parametrize("command", ["generate", "evaluate", "verify"])
def test_a_policy_of_the_registry_is_obeyed(
    command: str, server: Server, new_world: Callable[..., Any], tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, blocktune: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    from blocktune.search.generation import load

    identity = ModelIdentity.of(load(str(tiny_model), "cpu", None))
    tuned = {"num_inference_steps": 2, "dtype": "float32", "max_sequence_length": 12}
    picked = BlockPolicy(
        name="balanced", model=identity, rules=policy("balanced").rules, tuned_for=tuned,
        evidence={"confirmed": {"crispness": {"delta": 0.0, "ci95": [-1e3, 1e3]}}},
    )  # fmt: skip
    name = register(tmp_path, config_for(server.uri, f"name=served-{command}"), uuid4().hex, {"balanced": picked})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.chdir(tmp_path)
    where = f"models:/{name}@balanced"
    prompts = ["--prompts", str(new_world().folder / "search.jsonl")]
    arguments = {
        "generate": ["generate", "--policy", where, "--prompt", "a ring"],
        "evaluate": ["evaluate", where, "--evaluators", "crispness", *prompts],
        "verify": ["verify", where, "--evaluators", "crispness", *prompts],
    }[command]
    code, out, err = blocktune(*arguments, "--model", str(tiny_model))
    assert code == 0, err
    assert {"generate": "out.png", "evaluate": "n = 3", "verify": "crispness"}[command] in out


MISTAKES: dict[str, tuple[str, list[str], str]] = {
    "no place": ("models:/a@b", [], "needs --mlflow-uri or MLFLOW_TRACKING_URI"),
    "no alias": ("models:/a", ["--mlflow-uri", "STORE"], "accepted: a file, models:/NAME@ALIAS"),
    "no such model": ("models:/nothing@fast", ["--mlflow-uri", "STORE"], "'models:/nothing@fast' cannot be had from"),
    "no such file": ("models:/a@b", ["--mlflow-uri", "sqlite:///none.db"], "there is no such file"),
    "no server": ("models:/a@b", ["--mlflow-uri", "http://127.0.0.1:9"], "cannot be had from 'http://127.0.0.1:9'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(
    case: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., str]
) -> None:
    reference, more, told = MISTAKES[case]
    client(store).search_experiments()  # the database is there
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    more = [store if word == "STORE" else word for word in more]
    assert told in mistake("evaluate", reference, *more)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_optunas_dashboard_opens_the_study(tmp_path: Path) -> None:
    from blocktune.search.storage import STUDY, open_storage

    url, port = f"sqlite:///{tmp_path / 'study.db'}", free_port()
    optuna.create_study(study_name=STUDY, storage=open_storage(url), directions=["maximize", "maximize", "minimize"])
    command = [str(Path(sys.executable).parent / "optuna-dashboard"), url, "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        dashboard = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        studies = f"http://127.0.0.1:{port}/api/studies"
        until(lambda: answers(studies), "the dashboard")
        with urllib.request.urlopen(studies, timeout=5) as reply:
            (found,) = json.load(reply)["study_summaries"]
        assert found["study_name"] == STUDY
        assert len(found["directions"]) == 3
    finally:
        dashboard.kill()
        dashboard.wait(HANG)
