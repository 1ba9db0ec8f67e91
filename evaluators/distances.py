"""Distances between two sets of pictures, for reports: CMMD and the Fréchet distance behind FID.

They compare distributions, so they give one number to a set and none to a picture: no evaluator, and nothing to search
on. Pictures need not be paired. `embed` maps pictures to vectors `(n, dim)`; the number means nothing without its name.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from .evaluator import Images
from .pictures import as_picture

Embed = Callable[[Sequence[Image.Image]], torch.Tensor]
_SIGMA, _SCALE = 10.0, 1000.0


def cmmd(images: Images, reference: Images, embed: Embed | None = None) -> float:
    """1000 times the squared maximum mean discrepancy of unit CLIP vectors, kernel exp(-|x - y|^2 / 200); 0 or more.

    Jayasumana et al. 2024 (arXiv:2401.09603), the biased estimate of their code. `embed` is CLIP ViT-L-14-336 of OpenAI
    on pictures squashed to a square when not given. Stable from some hundred pictures on.
    """
    x, y = _vectors(images, embed or _cmmd_clip), _vectors(reference, embed or _cmmd_clip)
    return float(_SCALE * (_kernel(x, x).mean() + _kernel(y, y).mean() - 2 * _kernel(x, y).mean()))


def fid(images: Images, reference: Images, embed: Embed) -> float:
    """Fréchet distance of Gaussians fitted to the vectors of both sets; Heusel et al. 2017 (arXiv:1706.08500).

    It is FID when `embed` is the Inception network of the paper; with another, say which. The estimate is biased
    upwards while there are not many more pictures than dimensions: 5000 and more for a figure to be published.
    """
    x, y = _vectors(images, embed), _vectors(reference, embed)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"fid has {len(x)} images and {len(y)} reference pictures; accepted: two or more of each")
    covariance_x, covariance_y = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    # the eigenvalues of Cx Cy are those of Cx^1/2 Cy Cx^1/2, which is symmetric
    values, axes = np.linalg.eigh(covariance_x)
    root = (axes * np.sqrt(values.clip(0))) @ axes.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_y @ root).clip(0)).sum()
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariance_x) + np.trace(covariance_y) - 2 * cross
    return float(max(distance, 0.0))


def _vectors(images: Images, embed: Embed) -> np.ndarray:
    pictures = []
    for index, image in enumerate(images):
        picture = as_picture(image)
        if picture is None:
            raise ValueError(f"image {index} has NaN, inf or no pixels; accepted: pictures in order, as `sane` tells")
        pictures.append(picture)
    if not pictures:
        raise ValueError("images has no pictures; accepted: one or more")
    return np.asarray(embed(pictures), dtype=np.float64)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
    return np.exp(-squares / (2 * _SIGMA**2))


def _cmmd_clip(pictures: Sequence[Image.Image]) -> torch.Tensor:
    from .clip import load_clip

    return load_clip("ViT-L-14-336/openai", resize_mode="squash").images(pictures)
