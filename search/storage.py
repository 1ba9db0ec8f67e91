"""Where a study is stored, and which of its trials stand on the axes: all that a reader of a search needs."""

from typing import Any

import optuna
from optuna.trial import TrialState

from .config import Config
from .front import Point
from .run_directory import RunDirectory

STUDY = "blocktune"


def study_url(run: RunDirectory, config: Config) -> str:
    return config.search.storage or f"sqlite:///{run.path.absolute() / 'study.db'}"


def open_storage(url: str) -> optuna.storages.RDBStorage:
    engine: dict[str, Any] = {"connect_args": {"timeout": 30}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=engine)


def point_of(trial: optuna.trial.FrozenTrial) -> Point:
    """A finished trial on the axes."""
    alignment, quality, latency = trial.values
    name = trial.user_attrs.get("anchor") or f"trial {trial.number}"
    attrs = trial.user_attrs
    return Point(name, alignment, quality, latency, attrs["key"], attrs["steps"], bool(attrs.get("anchor")))


def stands(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether the trial keeps the constraints and has all its pictures: one dropped in the race has an estimate."""
    return all(v <= 0 for v in trial.constraints.values()) and "dropped" not in trial.user_attrs


def feasible(study: optuna.Study, anchors: bool = False) -> list[optuna.trial.FrozenTrial]:
    """Complete trials that stand; `anchors` are known points, and stand whatever they break."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [t for t in complete if stands(t) or (anchors and "anchor" in t.user_attrs)]
