"""MLflow from the driver: a parent run for the search, a child run per trial, and the picks in the Model Registry.

The search hands over records and goes on; a thread sends them. What is not sent yet lies in `outbox.jsonl` of the run
directory, so that neither a server that dies nor a driver that is killed loses any. Only MlflowClient is used: no
active runs, no global state. Not covered: two searches that write one run.
"""

import hashlib
import json
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluators import Prompt
from ..policies import BlockPolicy
from .config import Config
from .registry import register, registered_model
from .run_directory import RunDirectory

_LOG = logging.getLogger("blocktune")
OUTBOX = "outbox.jsonl"
_AGAIN = 1.0  # seconds between two tries of a server that does not answer
_MOMENT = 10.0  # seconds that anything waits for such a server
_SLOW = 60.0  # seconds that the end waits for one that has not failed
_GATHERED = 5.0  # seconds for which progress is gathered: one call takes it together for a sixth of the work


def tracking_uri(config: Config, folder: Path) -> str:
    return config.mlflow.uri or f"sqlite:///{folder.absolute() / 'mlflow.db'}"


def _make_database(path: Path) -> None:
    """MLflow's tables, made beside and renamed into place: amid their making a kill leaves what nothing can open."""
    from mlflow import MlflowClient

    if not path.exists():
        beside = path.with_name(path.name + ".new")
        beside.unlink(missing_ok=True)
        MlflowClient(f"sqlite:///{beside.absolute()}").search_experiments()
        beside.replace(path)


@dataclass(frozen=True)
class Record:
    """What to add to the parent run, or with a number to that trial's: sent twice, it is there once."""

    stamp: int  # milliseconds since 1970, as MLflow counts
    trial: int | None = None
    started: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # by the artifact's name
    files: list[str] = field(default_factory=list)  # in the run directory, where they lie there
    datasets: list[dict[str, str]] = field(default_factory=list)
    picks: dict[str, str] | None = None  # policy files by alias
    status: str | None = None

    @property
    def is_progress(self) -> bool:
        return self.trial is None and not (self.params or self.tags or self.texts or self.files or self.status)


class _Run(NamedTuple):
    """A run on the server, and where its artifacts lie."""

    id: str
    artifacts: str

    @classmethod
    def of(cls, run: Any) -> "_Run":
        return cls(run.info.run_id, run.info.artifact_uri)


def _now() -> int:
    return int(time.time() * 1000)


def _refused(error: Exception) -> bool:
    """Whether the server answered that it will never take this, so that sending it again is vain."""
    status = getattr(error, "get_http_status_code", lambda: 0)()
    return status in (400, 404, 409)


class Tracker:
    """Records of one search, which `search` (an id of its own) names on the server whatever process goes on with it."""

    def __init__(self, config: Config, folder: Path, search: str):
        self._uri, self._folder, self._search, self._config = tracking_uri(config, folder), folder, search, config
        self._outbox = folder / OUTBOX
        self._client: Any = None  # None while the server does not answer
        self._monitor: Any = None
        self._run, self._children = _Run("", ""), dict[int, _Run]()
        self._met = threading.Event()
        self._failing, self._taken = False, time.monotonic()
        self._queue: queue.Queue[Record | None] = queue.Queue()
        self._lock, self._stop, self._unsent = threading.Lock(), threading.Event(), 0
        for record in self._left():
            self._unsent += 1
            self._queue.put(record)
        self._thread = threading.Thread(target=self._work, name="records", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """The parent run; empty where the server has not answered for a moment."""
        self._met.wait(0 if self._failing else _MOMENT)
        return self._run.id

    def _left(self) -> list[Record]:
        """What another process could not send. A kill may have torn a line: its trial is told again anyway."""
        records = []
        for line in self._outbox.read_text("utf-8").splitlines() if self._outbox.exists() else []:
            try:
                records.append(Record(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        return records

    # What the search says

    def _add(self, record: Record) -> None:
        with self._lock:
            with self._outbox.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(asdict(record)))  # in front: a line that a full disk tore ends here
            self._unsent += 1
        self._queue.put(record)

    def begin(self, params: dict[str, Any], tags: dict[str, Any], prompts: dict[str, tuple[Prompt, ...]]) -> None:
        """A process takes the search up: its config, what it runs on, and the prompts by split."""
        datasets = []
        for split, chosen in prompts.items():
            rows = json.dumps([[p.text, p.kind, p.seed] for p in chosen])
            digest = hashlib.sha256(rows.encode()).hexdigest()
            source = str(params[f"prompts.{split}"])
            datasets.append({"name": f"{split}-prompts", "digest": digest[:32], "context": split, "source": source,
                             "profile": json.dumps({"num_rows": len(chosen)})})  # fmt: skip
            params = params | {f"prompts.{split}_sha256": digest}
        told = {key: str(value) for key, value in params.items()}
        named = {key: str(value) for key, value in tags.items()}
        self._add(Record(_now(), params=told, tags=named, datasets=datasets, status="RUNNING"))

    def trial(
        self,
        number: int,
        started: datetime | None,
        params: dict[str, Any],
        metrics: dict[str, float],
        policy: BlockPolicy,
        reason: str | None,
    ) -> None:
        """A finished trial as a child run, the one it has where it was told before; with a `reason` it failed."""
        tags = {"policy_digest": policy.digest} | ({"reason": reason} if reason else {})
        self._add(
            Record(
                _now(), number, int(started.timestamp() * 1000) if started else None,
                {key: str(value) for key, value in params.items()}, metrics, 0, tags,
                {"policy.json": policy.to_json_string()}, status="FAILED" if reason else "FINISHED",
            )
        )  # fmt: skip

    def progress(self, step: int, metrics: dict[str, float]) -> None:
        self._add(Record(_now(), metrics=metrics, step=step))

    def confirmed(self, number: int, metrics: dict[str, float], picks: list[str], grid: Path) -> None:
        """What a trial was on held-out prompts, what it is picked for, and its pictures."""
        tags = {"confirmed": "true", "picks": ", ".join(picks)}
        self._add(Record(_now(), number, metrics=metrics, tags=tags, files=self._inside([grid])))

    def finish(
        self,
        status: str,
        files: Iterable[Path] = (),
        tables: dict[str, list[dict[str, Any]]] | None = None,
        picks: dict[str, Path] | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        """The end of this process' part: files of the run directory, tables by name, and policy files by alias.

        `picks` are registered, and are all there are: an alias that an earlier end of this search gave goes.
        """
        tables = tables or {}
        # what MLflow's log_table writes; that appends to a table that is there, and a resume would double it
        texts = {
            f"{name}.json": json.dumps({"columns": list(rows[0]), "data": [list(row.values()) for row in rows]})
            for name, rows in tables.items()
            if rows
        }
        listed = {"mlflow.loggedArtifacts": json.dumps([{"path": path, "type": "table"} for path in texts])}
        chosen = None if picks is None else {alias: path.read_text("utf-8") for alias, path in picks.items()}
        self._add(
            Record(
                _now(), tags=(listed if texts else {}) | (tags or {}), texts=texts, files=self._inside(files),
                picks=chosen, status=status,
            )
        )  # fmt: skip

    def _inside(self, files: Iterable[Path]) -> list[str]:
        return [str(file.relative_to(self._folder)) for file in files]

    def close(self) -> None:
        """Wait for what is not sent while the server takes it; what it does not take for a moment stays on disk."""
        self._queue.put(None)
        began = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - max(began, self._taken) < (
            _MOMENT if self._failing else _SLOW
        ):
            self._thread.join(0.1)
        self._stop.set()
        if self._monitor and not self._failing:
            self._monitor.finish()
        if self._unsent:
            _LOG.warning(
                "%d records for MLflow at %s wait in %s; --resume sends them.", self._unsent, self._uri, self._outbox
            )

    # What the thread does with it

    def _work(self) -> None:
        for records in self._together():
            while not self._delivered(records):
                if self._stop.wait(_AGAIN):
                    return
            with self._lock:
                self._unsent -= len(records)
                if not self._unsent:
                    self._outbox.unlink(missing_ok=True)

    def _together(self) -> Iterator[list[Record]]:
        """What is sent at once: progress that came in a few seconds, or another record, each as it comes."""
        progress: list[Record] = []
        due, ended = 0.0, False
        while not ended:
            record = None
            try:
                record = self._queue.get(timeout=max(0.0, due - time.monotonic()) if progress else None)
                ended = record is None
            except queue.Empty:
                pass
            if record and record.is_progress:
                due = due if progress else time.monotonic() + _GATHERED
                progress.append(record)
            if progress and (ended or time.monotonic() >= due):
                yield progress
                progress = []
            if record and not record.is_progress:
                yield [record]

    def _delivered(self, records: list[Record]) -> bool:
        """Whether the records are settled: sent, or refused for good."""
        try:
            if self._client is None:
                self._connect()
        except Exception as error:  # a tracking server must never end a search
            self._fails(error)
            return False
        try:
            self._send(records)
        except Exception as error:
            if not _refused(error):
                self._fails(error)
                return False
            _LOG.warning("MLflow refused a record: %s", _short(error))
        self._failing, self._taken = False, time.monotonic()
        return True

    def _fails(self, error: Exception) -> None:
        if not self._failing:
            _LOG.warning("MLflow does not record (%s); the search goes on, records wait for it.", _short(error))
        # on connecting again, runs are found that it made without our hearing of it
        self._failing, self._client = True, None

    def _connect(self) -> None:
        from mlflow import MlflowClient

        # its store prints a traceback of each error that it raises, too: `_fails` tells those in a sentence
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        if self._config.mlflow.uri is None:
            _make_database(self._folder / "mlflow.db")
        client, name = MlflowClient(self._uri), self._config.mlflow.experiment
        found = client.get_experiment_by_name(name)
        location = None  # the server's own choice
        if self._uri.startswith("sqlite:///"):
            location = (Path(self._uri.removeprefix("sqlite:///")).absolute().parent / "artifacts").as_uri()
        self._experiment = found.experiment_id if found else client.create_experiment(name, location)
        parents = client.search_runs([self._experiment], f"tags.`blocktune.search` = '{self._search}'")
        tags = {"blocktune.kind": "search", "blocktune.search": self._search}
        self._run = _Run.of(
            parents[0] if parents else client.create_run(self._experiment, run_name=self._config.name, tags=tags)
        )
        query = f"tags.`mlflow.parentRunId` = '{self._run.id}'"
        children = client.search_runs([self._experiment], query, max_results=50_000)
        self._children = {int(child.data.tags["trial"]): _Run.of(child) for child in children}
        self._client = client
        self._met.set()
        if self._monitor:  # it ended with the connection
            self._watch()

    def _watch(self) -> None:
        """Load, memory and traffic of the driver's machine, by a thread of MLflow's that ends with the run."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if self._monitor:
            self._monitor.finish()
        self._monitor = SystemMetricsMonitor(self._run.id, resume_logging=True, tracking_uri=self._uri)
        self._monitor.start()

    def _run_of(self, record: Record) -> tuple[_Run, bool]:
        """The run that a record is for, and whether it was made just now."""
        if record.trial is None:
            return self._run, False
        made = record.trial not in self._children
        if made:
            own = {"mlflow.parentRunId": self._run.id, "blocktune.kind": "trial", "trial": str(record.trial)}
            tags = own | {key: value[:8000] for key, value in record.tags.items()}
            run = self._client.create_run(
                self._experiment, start_time=record.started or record.stamp, run_name=f"trial-{record.trial:04d}",
                tags=tags,
            )  # fmt: skip
            self._children[record.trial] = _Run.of(run)
        return self._children[record.trial], made

    def _send(self, records: list[Record]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        record = records[0]  # more are of progress, which has metrics alone
        (run, artifacts), made = self._run_of(record)
        there = self._client.get_run(run).data.params if record.params and not made else {}
        params = {key: value[:6000] for key, value in record.params.items()}
        # a param stands for ever: what a resume says otherwise is told in a tag
        changed = {key: value for key, value in params.items() if there.get(key, value) != value}
        metrics = [Metric(key, value, one.stamp, one.step) for one in records for key, value in one.metrics.items()]
        new = [Param(key, value) for key, value in params.items() if key not in there]
        told = changed if made else record.tags | changed  # a new run was made with its tags
        tags = [RunTag(key, value[:8000]) for key, value in told.items()]
        while metrics or new or tags:  # as many as MLflow takes in one call
            self._client.log_batch(run, metrics[:800], new[:100], tags[:100])
            metrics, new, tags = metrics[800:], new[100:], tags[100:]
        if record.datasets:
            inputs = [
                DatasetInput(
                    Dataset(d["name"], d["digest"], "local", json.dumps({"uri": d["source"]}), profile=d["profile"]),
                    [InputTag("mlflow.data.context", d["context"])],
                )
                for d in record.datasets
            ]
            self._client.log_inputs(run, inputs)
        if record.texts:
            with tempfile.TemporaryDirectory() as folder:
                for name, text in record.texts.items():
                    (written := Path(folder) / name).write_text(text, "utf-8")
                    self._put(artifacts, written)
        for file in map(Path, record.files):
            if (self._folder / file).exists():
                self._put(artifacts, self._folder / file, file.parent)
        if record.picks is not None:
            register(self._client, registered_model(self._config), run, record.picks)
        if record.status == "RUNNING":
            self._client.update_run(run, status="RUNNING")
            self._watch()
        elif record.status:
            self._client.set_terminated(run, record.status, record.stamp)

    def _put(self, artifacts: str, file: Path, folder: Path = Path()) -> None:
        """Into a run's artifacts: the client would first ask, for each run, where they lie."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
        from mlflow.utils.uri import add_databricks_profile_info_to_artifact_uri

        place = str(add_databricks_profile_info_to_artifact_uri(artifacts, self._client.tracking_uri))
        repository = get_artifact_repository(place, tracking_uri=self._client.tracking_uri)
        repository.log_artifact(str(file), folder.as_posix() if folder.name else None)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def send_left(config: Config, run: RunDirectory) -> None:
    """Send what a finished search could not."""
    if (run.path / OUTBOX).exists():
        Tracker(config, run.path, run.read_state()["search"]).close()
