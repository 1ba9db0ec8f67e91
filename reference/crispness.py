"""Quality in the reference world: how close a picture comes to flat ground, flat colours and one-pixel edges.

A picture is held against the ideal of its own segmentation, so what it shows does not matter, only how cleanly it is
drawn. Covered: noise, blur, tint and ghosts. Not covered: whether the shapes are well formed, and what was asked for.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import ndimage

from ..evaluators.evaluator import Images, as_array, check_lengths
from .scenes import COLORS, GROUND

_GROUND = np.array(GROUND, np.float32)
_PALETTE = np.array(list(COLORS.values()), np.float32)
_FOREGROUND = 0.30  # from the ground, in RGB distance, as the judge has it
_SQUARE = np.ones((3, 3), bool)
_MIN_AREA = 14  # pixels inside objects; a picture with less shows nothing
_MIN_GROUND = 0.1  # share of pixels well away from objects
# What true renderings have is free; above it, a tolerance costs a factor e.
_EDGE_GAP = 0.04  # at the tips of a triangle or diamond, where no pixel is all object; none along any straight edge
_EDGE_TOLERANCE = 0.08
_MIXED = (0.1, 0.9)  # cover of a pixel that an edge crosses
_FLAT = 0.006  # RGB distance, ground and inside together, that rounding to 8 bits makes
_FLAT_TOLERANCE = 0.12


class Crispness:
    """Evaluator `crispness`: flatness of ground, times flatness of colours, times sharpness of edges."""

    name = "crispness"
    direction: Literal["maximize", "minimize"] = "maximize"
    needs_reference = False

    def score(self, images: Images, prompts: Sequence[str], reference: Images | None = None) -> np.ndarray:
        """One score in [0, 1] per image, float64 `(n,)`. Prompts and reference are not looked at."""
        check_lengths(images, prompts, reference)
        return np.array([crispness(picture) for picture in as_array(images)], dtype=np.float64)


def crispness(picture: np.ndarray) -> float:
    """The score of one picture, float `(h, w, 3)` in [0, 1]; 0 where a pixel is not finite."""
    parts = measure(picture)
    if parts is None:
        return 0.0
    ground, inside, gap = parts
    unflat, blur = max(0.0, ground + inside - _FLAT), max(0.0, gap - _EDGE_GAP)
    return float(np.exp(-unflat / _FLAT_TOLERANCE - blur / _EDGE_TOLERANCE))


def measure(picture: np.ndarray) -> tuple[float, float, float] | None:
    """Root mean square RGB distance of ground and of insides from flat, and mean gap of edges; None: no objects.

    Cover is the share of an object in a pixel. A one-pixel edge rises from none to all of it within three pixels,
    wherever it lies between them and however it is turned; what of that rise the 3x3 pixels around a mixed one lack is
    its gap. Means of squares, not of distances: a faint ghost is a large error of few pixels.
    """
    if not np.isfinite(picture).all():
        return None
    picture = picture.clip(-1, 2)  # worse than that is not told apart
    from_ground = np.linalg.norm(picture - _GROUND, axis=-1)  # (h, w)
    objects = from_ground > _FOREGROUND
    near = ndimage.binary_dilation(objects, _SQUARE)
    inner = np.asarray(ndimage.binary_erosion(objects, _SQUARE), bool)
    away = np.logical_not(ndimage.binary_dilation(near, _SQUARE))
    if inner.sum() < _MIN_AREA or away.mean() < _MIN_GROUND:
        return None
    from_palette = np.linalg.norm(picture[inner][:, None] - _PALETTE, axis=-1)  # (pixels inside, colours)
    color = np.zeros(inner.shape, np.intp)
    color[inner] = from_palette.argmin(-1)
    # the rim mixes object and ground, and may come near to a third colour: it belongs to the object inside of it
    rows, columns = ndimage.distance_transform_edt(np.logical_not(inner), return_distances=False, return_indices=True)  # pyright: ignore[reportGeneralTypeIssues]
    contrast = (_PALETTE - _GROUND)[color[rows, columns]]  # (h, w, 3)
    cover = (((picture - _GROUND) * contrast).sum(-1) / (contrast**2).sum(-1)).clip(0, 1)  # (h, w)
    low, high = _MIXED
    crossed = near & np.logical_not(inner) & (cover > low) & (cover < high)
    rise = ndimage.maximum_filter(cover, 3) - ndimage.minimum_filter(cover, 3)
    gap = float(1 - rise[crossed].mean()) if crossed.any() else 0.0
    return _rms(from_ground[away]), _rms(from_palette.min(-1)), gap


def _rms(distances: np.ndarray) -> float:
    return float(np.sqrt(np.mean(distances**2)))
