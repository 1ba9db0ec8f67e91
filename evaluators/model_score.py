"""What scores by a pretrained model share: names with a checkpoint, and an answer for pictures that are none."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from .evaluator import Images, check_lengths
from .pictures import as_picture, sane_pictures


class _ByModel(ABC):
    """The checkpoint is part of the name, so that records of different checkpoints cannot be mixed.

    The bare family stands for the published one. It is loaded at the first score.
    """

    family: str

    def __init__(self, checkpoint: str = ""):
        self.name = f"{self.family}:{checkpoint}" if checkpoint else self.family


class PictureScore(ABC):
    """One score per picture that is `sane`, the `worst` value of the scale for any other.

    Models give such pictures middling scores: a black frame beats the worst healthy picture on CLIP (sglang#39714).
    """

    name: str
    worst: float  # the worst value that the scale can take
    direction: Literal["maximize", "minimize"] = "maximize"
    needs_reference = False

    @abstractmethod
    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[float] | np.ndarray:
        """Scores `(n,)` of RGB pictures, one or more, each with its prompt."""

    def score(self, images: Images, prompts: Sequence[str], reference: Images | None = None) -> np.ndarray:
        """Scores of `images`, float64 `(n,)`. Raises CheckpointError when a checkpoint cannot be loaded."""
        check_lengths(images, prompts, reference)
        pictures = sane_pictures(images)
        scores = np.full(len(images), self.worst if len(pictures) < len(images) else np.nan)
        if pictures:
            scores[list(pictures)] = self.judge(list(pictures.values()), [prompts[i] for i in pictures])
        return scores


class ModelScore(_ByModel, PictureScore):
    """One score per picture by a pretrained model, which its name tells."""


class ModelFidelity(_ByModel):
    """How close each picture stays to its reference by a pretrained model.

    A picture that cannot be compared (NaN, inf, another size than its reference) gets the `worst` value of the scale.
    """

    worst: float
    direction: Literal["maximize", "minimize"]
    needs_reference = True

    @abstractmethod
    def compare(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> np.ndarray:
        """Values `(n,)` of pairs of RGB pictures, one or more, each pair of one size."""

    def score(self, images: Images, prompts: Sequence[str], reference: Images | None = None) -> np.ndarray:
        """One value per picture, float64 `(n,)`. Raises ValueError without `reference`, CheckpointError as a score."""
        if reference is None:
            raise ValueError(f"reference is None; {self.name} compares every picture with one of the unmodified model")
        check_lengths(images, prompts, reference)
        pairs = [(as_picture(a), as_picture(b)) for a, b in zip(images, reference, strict=True)]
        kept = {i: (a, b) for i, (a, b) in enumerate(pairs) if a is not None and b is not None and a.size == b.size}
        scores = np.full(len(pairs), self.worst if len(kept) < len(pairs) else np.nan)
        if kept:
            scores[list(kept)] = self.compare([a for a, _ in kept.values()], [b for _, b in kept.values()])
        return scores
