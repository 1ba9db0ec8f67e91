"""Scores of pictures by all evaluators of a config, in the worker or in an actor of its own beside it."""

import os
from collections.abc import Sequence

import numpy as np

from ..evaluators import get
from .config import Config, Objectives


def score(
    objectives: Objectives, images: np.ndarray, texts: Sequence[str], reference: np.ndarray
) -> dict[str, np.ndarray]:
    """`(n,)` per evaluator that `objectives` name, and `sane`; `reference` are the unmodified model's pictures."""
    names = dict.fromkeys((objectives.alignment, objectives.quality, *objectives.reported, "sane"))
    return {name: get(name).score(images, texts, reference) for name in names}


def held_out_cmmd(config: Config, images: np.ndarray, reference: np.ndarray) -> float | None:
    """CMMD of two sets of pictures by `confirm.cmmd`; None where it names no model and none comes with the pipeline."""
    from ..evaluators import cmmd
    from ..evaluators.clip import load_clip
    from ..reference.scorers import PREFERENCE

    name = config.confirm.cmmd or (PREFERENCE if config.model.path == "reference" else None)
    return cmmd(images, reference, load_clip(name, resize_mode="squash").images) if name else None


class Scorer:
    """An actor that scores batch after batch while its worker makes the next; it lives and dies with the worker."""

    def __init__(self, config: Config) -> None:
        if not config.ray.evaluator_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray does not hide GPUs from an actor that asks for none
        self.objectives = config.objectives

    def score(self, images: np.ndarray, texts: Sequence[str], reference: np.ndarray) -> dict[str, np.ndarray]:
        return score(self.objectives, images, texts, reference)
