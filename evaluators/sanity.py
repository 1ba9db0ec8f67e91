"""Evaluator `sane`: whether a picture is a picture at all. A constraint for a search, not a score to climb."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .evaluator import Images, check_lengths, image_array

_RANGE_SLACK = 1e-3  # float pictures may leave [0, 1] by rounding


class Sane:
    """1 for a picture in order, else 0: NaN or inf, values outside [0, 1], flat, saturated, or not `(h, w, 3)`.

    Flat: no channel varies over the picture by a standard deviation of `flat`. Saturated: at least the share
    `saturated` of all values is black or white in its channel. With `reference`, a picture of another size than its
    reference is not in order either. Not seen: noise, blur, and whatever else is wrong without being degenerate.
    """

    name = "sane"
    direction: Literal["maximize", "minimize"] = "maximize"
    needs_reference = False

    def __init__(self, flat: float = 0.01, saturated: float = 0.98):
        self.flat = flat
        self.saturated = saturated

    def score(self, images: Images, prompts: Sequence[str], reference: Images | None = None) -> np.ndarray:
        """1.0 or 0.0 per picture, float64 `(n,)`. No picture raises, whatever its shape, size, dtype or values."""
        check_lengths(images, prompts, reference)
        references = reference if reference is not None else [None] * len(images)
        return np.array([self._sane(*pair) for pair in zip(images, references, strict=True)], dtype=np.float64)

    def _sane(self, image, reference) -> bool:
        try:
            pixels = image_array(image).astype(np.float64)
        except ValueError:
            return False
        if reference is not None and pixels.shape != image_array(reference).shape:
            return False
        if pixels.size == 0 or not np.isfinite(pixels).all():
            return False
        if pixels.min() < -_RANGE_SLACK or pixels.max() > 1 + _RANGE_SLACK:
            return False
        extreme = (pixels < 0.5 / 255) | (pixels > 254.5 / 255)
        return bool(pixels.std(axis=(0, 1)).max() >= self.flat and extreme.mean() < self.saturated)
