"""Where a study is stored, how a search writes it, and which of its trials stand on the axes."""

import copy
import json
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages._rdb.models import TrialParamModel, TrialSystemAttributeModel, TrialUserAttributeModel
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, insert
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


class Storage(optuna.storages.InMemoryStorage):
    """The study of a database, read once and held in memory, so that no proposal waits for all trials to be read again.

    What is set lies in the database when the call returns, but for a trial that `ask` has made: it is written by
    `write`, with all its choices at once. Not covered: two processes that write one study.
    """

    def __init__(self, url: str):
        super().__init__()
        self._url, self._database = url, open_storage(url)
        self._rows: dict[int, int] = {}  # ids in the database, by those here
        self._asked: list[int] = []  # ids of trials that are not written yet
        for stored in self._database.get_all_studies():
            if stored.study_name == STUDY:
                study = super().create_new_study(stored.directions, STUDY)
                self._study = stored._study_id
                for name, value in stored.user_attrs.items():
                    super().set_study_user_attr(study, name, value)
                for trial in self._database.get_all_trials(self._study, deepcopy=False):
                    self._rows[super().create_new_trial(study, trial)] = trial._trial_id

    def write(self) -> None:
        """Put what was asked for, as far as it is known by now, into the database."""
        for trial_id in self._asked:
            self._insert(trial_id)
        self._asked = []

    def _insert(self, trial_id: int) -> None:
        trial = self.get_trial(trial_id)
        bare = copy.copy(trial)
        bare.params, bare.distributions, bare.user_attrs, bare.system_attrs = {}, {}, {}, {}
        row = self._rows[trial_id] = self._database.create_new_trial(self._study, bare)
        # the database's own way asks for each whether it is there, and of each choice what its distribution was
        choices = [
            {"trial_id": row, "param_name": name, "param_value": distribution.to_internal_repr(trial.params[name]),
             "distribution_json": distribution_to_json(distribution)}
            for name, distribution in trial.distributions.items()
        ]  # fmt: skip
        own, optunas = (
            [{"trial_id": row, "key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]
            for attrs in (trial.user_attrs, trial.system_attrs)
        )
        with self._database.engine.begin() as connection:
            for table, rows in (
                (TrialParamModel, choices), (TrialUserAttributeModel, own), (TrialSystemAttributeModel, optunas)
            ):  # fmt: skip
                if rows:
                    connection.execute(insert(table), rows)
        if self._database.get_trial_id_from_study_id_trial_number(self._study, trial.number) != row:
            raise ConfigError(f"another search writes the study in {self._url}; give each its own search.storage.")

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        study = super().create_new_study(directions, study_name)
        self._study = self._database.create_new_study(directions, study_name)
        return study

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        super().set_study_user_attr(study_id, key, value)
        self._database.set_study_user_attr(self._study, key, value)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        if template_trial is None:
            self._asked.append(trial_id)
        else:
            self._insert(trial_id)
        return trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        if trial_id in self._rows:
            self._database.set_trial_param(self._rows[trial_id], param_name, param_value_internal, distribution)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_user_attr(trial_id, key, value)
        if trial_id in self._rows:
            self._database.set_trial_user_attr(self._rows[trial_id], key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_system_attr(trial_id, key, value)
        if trial_id in self._rows:
            self._database.set_trial_system_attr(self._rows[trial_id], key, value)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        self.write()
        row = self._rows[trial_id]
        self._database.set_trial_state_values(row, state, values)
        done = super().set_trial_state_values(trial_id, state, values)
        if state == TrialState.RUNNING:  # an enqueued one begins, and each storage looks at the clock for itself
            self.get_trial(trial_id).datetime_start = self._database.get_trial(row).datetime_start
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
