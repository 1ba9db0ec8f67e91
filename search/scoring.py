"""Scores of pictures by all evaluators of a config, in the worker or in an actor of its own beside it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from ..evaluators import get, time_runs
from .config import Config, ConfigError, Objectives

_OWN = "clip_score:reference"  # of the bundled model, where the config reports it


@dataclass(frozen=True)
class Measurement:
    """Scores per picture `(n,)` by evaluator, the pictures (uint8 `(n, h, w, 3)`), and where the seconds went."""

    scores: dict[str, np.ndarray]
    images: np.ndarray
    generate_seconds: float
    score_seconds: float  # not those that passed while pictures were made
    steps_saved: float  # share of the denoising steps that were known from earlier candidates
    distances: Mapping[str, float] = field(default_factory=dict)  # of all of them to the unmodified model's
    cache_bytes: int = 0  # that residuals took at most, in a batch; measured where there is a constraint on them


@dataclass(frozen=True)
class Pictures:
    """A measurement that a scorer is still at: references to the scores of each batch, and to the distances."""

    images: np.ndarray
    generate_seconds: float
    steps_saved: float
    scores: Sequence[Any]
    distances: Any = None
    cache_bytes: int = 0

    @property
    def last(self) -> Any:
        """The reference that is ready when all are: a scorer does one thing after the other, as it is asked."""
        return self.scores[-1] if self.distances is None else self.distances

    def measured(self, score_seconds: float) -> Measurement:
        """With all scores; raises what a scorer raised, or Ray's errors for one that died, with its worker or alone."""
        parts = ray.get(list(self.scores))
        scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        distances: Any = {} if self.distances is None else ray.get(self.distances)
        return Measurement(
            scores, self.images, self.generate_seconds, score_seconds, self.steps_saved, distances, self.cache_bytes
        )


def score(
    objectives: Objectives, images: np.ndarray, texts: Sequence[str], reference: np.ndarray
) -> dict[str, np.ndarray]:
    """`(n,)` per evaluator that `objectives` name, and `sane`; `reference` are the unmodified model's pictures."""
    names = dict.fromkeys((objectives.alignment, objectives.quality, *objectives.reported, "sane"))
    return {name: get(name).score(images, texts, reference) for name in names}


def judge_of(config: Config) -> str | None:
    """The evaluator that keeps the best of several pictures of a prompt; None where there is none.

    ConfigError for one that is not reported, needs the unmodified picture, or is the alignment that is to be judged.
    """
    objectives, name = config.objectives, config.confirm.best_of
    accepted = [n for n in objectives.reported if n != objectives.alignment and not get(n).needs_reference]
    if name is None:
        return _OWN if config.model.path == "reference" and _OWN in accepted else None
    if name not in accepted:
        what = f"reported, not the alignment, and needs no reference: {', '.join(accepted) or 'none here'}"
        raise ConfigError(f"confirm.best_of is {name!r}; accepted: what is {what}.")
    return name


def time_scoring(evaluator: str, images: np.ndarray, texts: Sequence[str]) -> float:
    """Seconds that one which needs no reference takes for `images`."""
    return time_runs(lambda: get(evaluator).score(images, texts), repeats=3)


def held_out_distances(config: Config, images: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Of two sets of pictures, by the models that `confirm` names: `cmmd`, for which one ships, and `fid`."""
    from ..evaluators import cmmd, fid, load_inception
    from ..evaluators.clip import load_clip
    from ..reference.scorers import PREFERENCE

    name = config.confirm.cmmd or (PREFERENCE if config.model.path == "reference" else None)
    told = {"cmmd": cmmd(images, reference, load_clip(name, resize_mode="squash").images)} if name else {}
    weights = config.confirm.fid
    return told | ({"fid": fid(images, reference, load_inception(weights))} if weights else {})


class Scorer:
    """An actor that scores batch after batch while its worker draws on; it lives and dies with the worker."""

    def __init__(self, config: Config) -> None:
        if not config.ray.evaluator_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray does not hide GPUs from an actor that asks for none
        self.config = config

    def score(self, images: np.ndarray, texts: Sequence[str], reference: np.ndarray) -> dict[str, np.ndarray]:
        return score(self.config.objectives, images, texts, reference)

    def time(self, evaluator: str, images: np.ndarray, texts: Sequence[str]) -> float:
        return time_scoring(evaluator, images, texts)

    def distances(self, images: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        return held_out_distances(self.config, images, reference)
