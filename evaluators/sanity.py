"""Evaluator `sane`: whether a picture is a picture at all. A constraint for a search, not a score to climb."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .evaluator import Images, check_lengths, image_pixels

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
            pixels = image_pixels(image)
        except ValueError:
            return False
        if reference is not None and pixels.shape != image_pixels(reference).shape:
            return False
        if pixels.size == 0:
            return False
        if pixels.dtype == np.uint8:
            return self._varies(*_counted(pixels))
        pixels = pixels.astype(np.float64)
        if not np.isfinite(pixels).all():
            return False
        if pixels.min() < -_RANGE_SLACK or pixels.max() > 1 + _RANGE_SLACK:
            return False
        extreme = (pixels < 0.5 / 255) | (pixels > 254.5 / 255)
        return self._varies(float(pixels.std(axis=(0, 1)).max()), float(extreme.mean()))

    def _varies(self, spread: float, extreme: float) -> bool:
        return spread >= self.flat and extreme < self.saturated


def _counted(pixels: np.ndarray) -> tuple[float, float]:
    """The largest standard deviation of a channel and the share of black and white, by counts of the 256 values.

    Exact, and without the floats of a large picture, which cost more than a small model's look at it.
    """
    counts = np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)])
    shares, values = counts / counts[0].sum(), np.arange(256) / 255
    means = shares @ values
    spread = np.sqrt((shares * (values - means[:, None]) ** 2).sum(axis=1)).max()
    return float(spread), float(shares[:, [0, 255]].sum() / 3)
