"""What scores by a pretrained model share: names with a checkpoint, and an answer for pictures that are none."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from .evaluator import Images, check_lengths, image_array


class _ByModel(ABC):
    """The checkpoint is part of the name, so that records of different checkpoints cannot be mixed.

    The bare family stands for the published one. It is loaded at the first score.
    """

    family: str
    worst: float  # the worst value that the scale can take

    def __init__(self, checkpoint: str = ""):
        self.name = f"{self.family}:{checkpoint}" if checkpoint else self.family


class ModelScore(_ByModel):
    """One score per picture by a pretrained model.

    A picture with NaN or inf, or of one colour, gets the `worst` value of the scale: models give such pictures middling
    scores (a black frame beats the worst healthy picture on CLIP, sglang#39714).
    """

    direction: Literal["maximize", "minimize"] = "maximize"
    needs_reference = False

    @abstractmethod
    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Scores `(n,)` of RGB pictures, one or more, each with its prompt."""

    def score(self, images: Images, prompts: Sequence[str], reference: Images | None = None) -> np.ndarray:
        """Scores of `images`, float64 `(n,)`. Raises CheckpointError when the checkpoint cannot be loaded."""
        check_lengths(images, prompts, reference)
        pictures = [as_picture(image) for image in images]
        kept = {i: picture for i, picture in enumerate(pictures) if picture is not None and not _flat(picture)}
        scores = np.full(len(pictures), self.worst if len(kept) < len(pictures) else np.nan)
        if kept:
            scores[list(kept)] = self.judge(list(kept.values()), [prompts[i] for i in kept])
        return scores


class ModelFidelity(_ByModel):
    """How close each picture stays to its reference by a pretrained model.

    A picture that cannot be compared (NaN, inf, another size than its reference) gets the `worst` value of the scale.
    """

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


def as_picture(image: Image.Image | np.ndarray) -> Image.Image | None:
    """An RGB picture of 8 bits, floats clipped to [0, 1] and rounded; None for one with NaN or inf, or no pixels."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = image_array(image)
    if pixels.size == 0 or not np.isfinite(pixels).all():
        return None
    return Image.fromarray(np.uint8(np.round(pixels.clip(0, 1) * 255)))


def _flat(picture: Image.Image) -> bool:
    return bool(np.ptp(np.asarray(picture), axis=(0, 1)).max() == 0)
