"""MLflow from the driver: a parent run for the search and a child run per trial. A tracker that fails warns, once."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..policies import BlockPolicy

_LOG = logging.getLogger("blocktune")


class Tracker:
    """Writes to one tracking server through MlflowClient: no active runs, no global state."""

    def __init__(self, uri: str, experiment: str, artifacts: Path, name: str, run_id: str | None):
        self.run_id = run_id or ""  # empty while the server has never answered
        self._children: dict[int, str] = {}
        self._alive = True
        self._attempt(lambda: self._connect(uri, experiment, artifacts, name))

    def _connect(self, uri: str, experiment: str, artifacts: Path, name: str) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self._client = MlflowClient(uri)
        found = self._client.get_experiment_by_name(experiment)
        location = artifacts.absolute().as_uri() if uri.startswith("sqlite:") else None
        self._experiment = found.experiment_id if found else self._client.create_experiment(experiment, location)
        if not self.run_id:
            run = self._client.create_run(self._experiment, run_name=name, tags={"blocktune.kind": "search"})
            self.run_id = run.info.run_id
        query = f"tags.`mlflow.parentRunId` = '{self.run_id}'"
        children = self._client.search_runs([self._experiment], query, max_results=50_000)
        self._children = {int(child.data.tags["trial"]): child.info.run_id for child in children}

    def _attempt(self, action: Callable[[], None]) -> None:
        if not self._alive:
            return
        try:
            action()
        except Exception as error:  # a tracking server must never end a search; what it missed is in the run directory
            self._alive = False
            _LOG.warning("MLflow stopped recording (%s); the search goes on.", " ".join(str(error).split())[:200])

    def describe(self, params: dict[str, Any], tags: dict[str, str]) -> None:
        def write() -> None:
            known = self._client.get_run(self.run_id).data.params
            for key, value in params.items():
                told = str(value)[:6000]
                if key not in known:
                    self._client.log_param(self.run_id, key, told)
                elif known[key] != told:  # a resume may have another budget, and MLflow keeps parameters as they were
                    self._client.set_tag(self.run_id, f"resumed.{key}", told)
            for key, value in tags.items():
                self._client.set_tag(self.run_id, key, value[:8000])

        self._attempt(write)

    def trial(
        self,
        number: int,
        params: dict[str, Any],
        metrics: dict[str, float],
        policy: BlockPolicy | None,
        reason: str | None,
    ) -> None:
        """A finished trial as a child run, the one it has where it was told before; with a `reason` it failed."""

        def write() -> None:
            from mlflow.entities import Metric, Param

            tags = {"mlflow.parentRunId": self.run_id, "blocktune.kind": "trial", "trial": str(number)}
            if policy is not None:
                tags["policy_digest"] = policy.digest
            if reason:
                tags["reason"] = reason
            if number not in self._children:
                made = self._client.create_run(self._experiment, run_name=f"trial-{number:04d}", tags=tags)
                self._children[number] = made.info.run_id
            run, stamp = self._children[number], 0
            self._client.log_batch(
                run,
                metrics=[Metric(k, v, stamp, 0) for k, v in metrics.items()],
                params=[Param(k, str(v)) for k, v in params.items()],
            )
            if policy is not None:
                with tempfile.TemporaryDirectory() as folder:
                    policy.save(file := Path(folder) / "policy.json")
                    self._client.log_artifact(run, str(file))
            self._client.set_terminated(run, "FAILED" if reason else "FINISHED")

        self._attempt(write)

    def progress(self, step: int, metrics: dict[str, float]) -> None:
        def write() -> None:
            for key, value in metrics.items():
                self._client.log_metric(self.run_id, key, value, step=step)

        self._attempt(write)

    def front_member(self, number: int, grid: Path) -> None:
        """Mark a trial of the front and attach its pictures."""

        def write() -> None:
            self._client.set_tag(self._children[number], "front", "true")
            self._client.log_artifact(self._children[number], str(grid))

        self._attempt(write)

    def finish(self, status: str, files: list[Path]) -> None:
        def write() -> None:
            for file in files:
                if file.exists():
                    self._client.log_artifact(self.run_id, str(file))
            self._client.set_terminated(self.run_id, status)

        self._attempt(write)
