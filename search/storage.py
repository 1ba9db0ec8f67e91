"""Where a study is stored, how a search writes it, and which of its trials stand on the axes."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import optuna
from optuna.distributions import distribution_to_json
from optuna.exceptions import StorageInternalError
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Table, delete, event, func, insert, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from .config import Config, ConfigError
from .front import Point, name_of
from .run_directory import RunDirectory

STUDY = "blocktune"


def study_url(run: RunDirectory, config: Config) -> str:
    return config.search.storage or f"sqlite:///{run.path.absolute() / 'study.db'}"


def check_storage(config: Config) -> None:
    """Raise what is wrong with the URL of the storage, which is not connected to."""
    url = config.search.storage
    try:
        if url is not None:
            make_url(url).get_dialect().import_dbapi()
    except (SQLAlchemyError, ImportError) as error:
        accepted = "the URL of a database whose driver is installed, as sqlite:////shared/study.db"
        raise ConfigError(f"search.storage is {url!r} ({error}); accepted: {accepted}.") from None


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """ConfigError for a database that cannot be opened."""
    sqlite = url.startswith("sqlite")
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 30}} if sqlite else {})
    except SQLAlchemyError as error:
        cause = " ".join(str(getattr(error, "orig", None) or error).split())
        raise ConfigError(f"search.storage: {url} cannot be opened: {cause}.") from None
    if sqlite:
        storage.engine.dispose()  # connections made from now on
        # a journal that is emptied and not deleted: as safe, on any file system, at two thirds of the work
        event.listen(storage.engine, "connect", lambda made, _: made.execute("PRAGMA journal_mode = TRUNCATE"))
    return storage


def _utc(moment: datetime | None) -> datetime | None:
    """As Optuna's database has it."""
    return moment and moment.astimezone(UTC).replace(tzinfo=None)


class _Rows(NamedTuple):
    """A table with a row for each of a trial's so and so: where the key stands, what there is by key, and one's row."""

    table: Table
    key: str
    of: Callable[[FrozenTrial], dict[Any, Any]]
    row: Callable[[FrozenTrial, Any], dict[str, Any]]


class _Written(NamedTuple):
    """A trial as it lies in the database. What its tables have is kept apart: Optuna adds to a trial's own."""

    row: int  # its id there
    trial: FrozenTrial
    tables: tuple[dict[Any, Any], ...]

    @classmethod
    def now(cls, row: int, trial: FrozenTrial) -> "_Written":
        return cls(row, trial, tuple(dict(rows.of(trial)) for rows in _OF_A_TRIAL))


def _choice(trial: FrozenTrial, name: str) -> dict[str, Any]:
    distribution = trial.distributions[name]
    value = distribution.to_internal_repr(trial.params[name])
    return {"param_value": value, "distribution_json": distribution_to_json(distribution)}


def _value(trial: FrozenTrial, objective: int) -> dict[str, Any]:
    value, kind = models.TrialValueModel.value_to_stored_repr(trial.values[objective])
    return {"value": value, "value_type": kind}


_STUDY_ATTRS: Table = models.StudyUserAttributeModel.__table__
_TRIALS: Table = models.TrialModel.__table__
_OF_A_TRIAL = (
    _Rows(models.TrialParamModel.__table__, "param_name", lambda t: t.params, _choice),
    _Rows(models.TrialUserAttributeModel.__table__, "key", lambda t: t.user_attrs,
          lambda t, key: {"value_json": json.dumps(t.user_attrs[key])}),
    _Rows(models.TrialSystemAttributeModel.__table__, "key", lambda t: t.system_attrs,
          lambda t, key: {"value_json": json.dumps(t.system_attrs[key])}),
    _Rows(models.TrialValueModel.__table__, "objective", lambda t: dict(enumerate(t.values or ())), _value),
)  # fmt: skip


class Storage(optuna.storages.InMemoryStorage):
    """The study of a database, read once and held in memory, so that no proposal waits for all trials to be read again.

    `write` makes the database what memory is, in one transaction; telling a state and enqueuing call it. Optuna's own
    way commits each attribute by itself and asks first whether it is there. Not covered: two processes that write one
    study.
    """

    def __init__(self, url: str):
        super().__init__()
        self._url, self._database = url, open_storage(url)
        self._written: dict[int, _Written] = {}  # by trial's number
        self._unwritten = set[str]()  # attributes of the study
        for stored in self._database.get_all_studies():
            if stored.study_name == STUDY:
                self._here, self._there = super().create_new_study(stored.directions, STUDY), stored._study_id
                for name, value in stored.user_attrs.items():
                    super().set_study_user_attr(self._here, name, value)
                for trial in self._database.get_all_trials(self._there, deepcopy=False):
                    held = self.get_trial(super().create_new_trial(self._here, trial))
                    self._written[held.number] = _Written.now(trial._trial_id, held)

    def write(self) -> None:
        """Put what has changed into the database: memory holds another object then for the trial.

        StorageInternalError, as of Optuna's own, where it cannot be written.
        """
        trials, written = self.get_all_trials(self._here, deepcopy=False), self._written
        changed = [n for n, trial in enumerate(trials) if n not in written or written[n].trial is not trial]
        if changed or self._unwritten:
            try:
                with self._database.engine.begin() as connection:
                    rows = {n: self._put(connection, trials[n]) for n in changed}
                    self._put_study(connection)
            except SQLAlchemyError as error:
                raise StorageInternalError("the study cannot be written") from error
            written |= {n: _Written.now(row, trials[n]) for n, row in rows.items()}
            self._unwritten.clear()

    def _put(self, connection: Connection, trial: FrozenTrial) -> int:
        """The trial's id in the database."""
        told = {"state": trial.state, "datetime_start": _utc(trial.datetime_start)}
        told |= {"datetime_complete": _utc(trial.datetime_complete)}
        before = self._written.get(trial.number)
        if before is None:
            new = insert(_TRIALS).values(study_id=self._there, number=trial.number, **told)
            [row] = list(connection.execute(new).inserted_primary_key or ())
            count = select(func.count()).select_from(_TRIALS).where(_TRIALS.c.study_id == self._there)
            if connection.scalar(count) != trial.number + 1:
                raise ConfigError(f"another search writes the study in {self._url}; give each its own search.storage.")
        else:
            row = before.row
            if trial.state != before.trial.state:
                connection.execute(update(_TRIALS).where(_TRIALS.c.trial_id == row).values(told))
        for i, (table, key, of, encoded) in enumerate(_OF_A_TRIAL):
            old, now = before.tables[i] if before else {}, of(trial)
            changed = [name for name, value in now.items() if name not in old or old[name] is not value]
            if replaced := [name for name in changed if name in old]:
                connection.execute(delete(table).where(table.c.trial_id == row, table.c[key].in_(replaced)))
            if changed:
                rows = [{"trial_id": row, key: name} | encoded(trial, name) for name in changed]
                connection.execute(insert(table), rows)
        return row

    def _put_study(self, connection: Connection) -> None:
        told, keys = self.get_study_user_attrs(self._here), sorted(self._unwritten)
        rows = [{"study_id": self._there, "key": key, "value_json": json.dumps(told[key])} for key in keys]
        if rows:
            of = _STUDY_ATTRS.c.study_id == self._there, _STUDY_ATTRS.c.key.in_(keys)
            connection.execute(delete(_STUDY_ATTRS).where(*of))
            connection.execute(insert(_STUDY_ATTRS), rows)

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        self._here = super().create_new_study(directions, study_name)
        self._there = self._database.create_new_study(directions, study_name)
        return self._here

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        super().set_study_user_attr(study_id, key, value)
        self._unwritten.add(key)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        if template_trial is not None:
            self.write()
        return trial_id

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        done = super().set_trial_state_values(trial_id, state, values)
        self.write()
        return done


def point_of(trial: FrozenTrial) -> Point:
    """A finished trial on the axes."""
    alignment, quality, latency = trial.values
    name, attrs = name_of(trial.number, trial.user_attrs), trial.user_attrs
    anchor, guidance = bool(attrs.get("anchor")), attrs.get("guidance_scale")
    return Point(name, alignment, quality, latency, attrs["key"], attrs["steps"], anchor, guidance)


def stands(trial: FrozenTrial) -> bool:
    """Whether the trial keeps the constraints and has all its pictures: one dropped in the race has an estimate."""
    return all(v <= 0 for v in trial.constraints.values()) and "dropped" not in trial.user_attrs


def feasible(study: optuna.Study, anchors: bool = False) -> list[FrozenTrial]:
    """Complete trials that stand; `anchors` are known points, and stand whatever they break."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [t for t in complete if stands(t) or (anchors and "anchor" in t.user_attrs)]
