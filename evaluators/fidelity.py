"""Evaluators `psnr` and `ssim`: how close a picture stays to the unmodified model's, same prompt and seed.

Fidelity is not quality: a better picture is punished as a worse one is. It is the signal of least variance, good as a
gate. A picture that cannot be compared (NaN, inf, another size than its reference) gets the lowest value of its scale.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from .checkpoints import device
from .evaluator import Images, check_lengths, image_array

PSNR_LIMIT = 100.0  # dB; equal pictures have an infinite ratio, and means must stay finite
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # for values in [0, 1]


class _Fidelity(ABC):
    direction: Literal["maximize", "minimize"] = "maximize"
    needs_reference = True
    name: str
    lowest: float

    def score(self, images: Images, prompts: Sequence[str], reference: Images | None = None) -> np.ndarray:
        """One value per picture, float64 `(n,)`; values outside [0, 1] are clipped. ValueError without `reference`."""
        if reference is None:
            raise ValueError(f"reference is None; {self.name} compares every picture with one of the unmodified model")
        check_lengths(images, prompts, reference)
        scores = [self._compare(image_array(a), image_array(b)) for a, b in zip(images, reference, strict=True)]
        return np.array(scores, dtype=np.float64)

    def _compare(self, image: np.ndarray, reference: np.ndarray) -> float:
        if image.shape != reference.shape or image.size == 0:
            return self.lowest
        if not (np.isfinite(image).all() and np.isfinite(reference).all()):
            return self.lowest
        return self.similarity(image.clip(0, 1).astype(np.float64), reference.clip(0, 1).astype(np.float64))

    @abstractmethod
    def similarity(self, image: np.ndarray, reference: np.ndarray) -> float:
        """Of two pictures of one size, finite, float64 `(h, w, 3)` in [0, 1]."""


class Psnr(_Fidelity):
    """Peak signal-to-noise ratio over all pixels and channels in dB, in [0, 100]; 100 for equal pictures."""

    name = "psnr"
    scale = PSNR_LIMIT  # a point is a dB
    lowest = 0.0

    def similarity(self, image: np.ndarray, reference: np.ndarray) -> float:
        error = np.mean((image - reference) ** 2)
        return float(-10 * np.log10(max(error, 10 ** (-PSNR_LIMIT / 10))))


class Ssim(_Fidelity):
    """Structural similarity of Wang et al. 2004 (doi:10.1109/TIP.2003.819861), in [-1, 1]; 1 for equal pictures.

    11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, on the positions where the whole window fits, and the mean
    over the three channels (the paper takes luminance alone). No downsampling before. Pictures
    smaller than the window get the lowest value.
    """

    name = "ssim"
    lowest = -1.0

    def similarity(self, image: np.ndarray, reference: np.ndarray) -> float:
        if min(image.shape[:2]) < _WINDOW:
            return self.lowest
        x, y = (torch.from_numpy(pixels).to(device()) for pixels in (image, reference))
        mean_x, mean_y = _smooth(x), _smooth(y)  # (h - 10, w - 10, 3)
        squares = mean_x**2 + mean_y**2
        product = mean_x * mean_y
        variances = _smooth(x**2 + y**2) - squares
        covariance = _smooth(x * y) - product
        ssim = (2 * product + _C1) * (2 * covariance + _C2) / ((squares + _C1) * (variances + _C2))
        return float(ssim.mean())


def _smooth(pixels: torch.Tensor) -> torch.Tensor:
    """Means under the Gaussian window, rows then columns: `(h, w, 3)` to `(h - 10, w - 10, 3)`.

    By sums, as torch's convolution of so few channels takes five times as long on a CPU.
    """
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    height, width = pixels.shape[0] - _WINDOW + 1, pixels.shape[1] - _WINDOW + 1
    rows = pixels.new_zeros((height, *pixels.shape[1:]))
    for i, weight in enumerate(weights.tolist()):
        rows.add_(pixels[i : i + height], alpha=weight)
    means = pixels.new_zeros((height, width, pixels.shape[2]))
    for i, weight in enumerate(weights.tolist()):
        means.add_(rows[:, i : i + width], alpha=weight)
    return means
