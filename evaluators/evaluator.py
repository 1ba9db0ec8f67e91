"""What an evaluator is, and how pictures of any form become one array.

Covered: the protocol every score follows and the conversion of PIL pictures and arrays. Not covered: which evaluators
there are (registry) and how two sets of scores compare (statistics).
"""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

Images = Sequence[Image.Image] | Sequence[np.ndarray] | np.ndarray


@runtime_checkable
class Evaluator(Protocol):
    """One score per picture. A score depends on its own picture, prompt and reference alone, never on the batch.

    An evaluator whose scores do not fill [0, 1] also says in `scale` what width of them counts as 100 points.
    """

    name: str
    direction: Literal["maximize", "minimize"]
    needs_reference: bool

    def score(self, images: Images, prompts: Sequence[str], reference: Images | None = None) -> np.ndarray:
        """Scores of `images`, float64 `(n,)`, finite also for broken pictures (black, noise, NaN, of a wrong size).

        `prompts` are as many as the images; `reference`, the unmodified model's picture for the same prompt and seed,
        is asked for where `needs_reference`. Raises ValueError when the lengths differ.
        """
        ...


def scale_of(evaluator: Evaluator) -> float:
    """Width of its scores that counts as 100 points: its `scale`, and 1.0 where it has none.

    Margins and differences of all evaluators are told in points. 1.0 suits scores in [0, 1].
    """
    return getattr(evaluator, "scale", 1.0)


def image_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """One picture as it is, uint8 or float32 `(h, w, 3)`: a PIL picture, or an array of uint8 or of floats in [0, 1].

    Floats are taken as they are, NaN and values out of range included. Raises ValueError for any other shape or dtype.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image has shape {pixels.shape}; accepted: (height, width, 3)")
    return pixels if pixels.dtype == np.uint8 else _unit(pixels)


def image_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """One picture as float32 `(h, w, 3)`, in [0, 1] where it was; else as `image_pixels`."""
    return _unit(image_pixels(image))


def as_array(images: Images) -> np.ndarray:
    """Pictures as float32 `(n, h, w, 3)`, in [0, 1] where they were: a list of PIL pictures or of arrays, or one array.

    uint8 is divided by 255; floats are taken as they are, NaN and values out of range included, and a float32 array is
    returned without a copy. Raises ValueError for any other shape or dtype, and for pictures of different sizes.
    """
    if isinstance(images, np.ndarray):
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images has shape {images.shape}; accepted: (n, height, width, 3)")
        return _unit(images)
    pictures = [image_array(image) for image in images]
    sizes = sorted({picture.shape[:2] for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(f"images have the sizes (height, width) {sizes}; accepted: pictures of one size")
    return np.stack(pictures) if pictures else np.empty((0, 0, 0, 3), np.float32)


def _unit(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"image has dtype {pixels.dtype}; accepted: uint8, or floats in [0, 1]")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which evaluators answer
        return pixels.astype(np.float32, copy=False)


def check_lengths(images: Images, prompts: Sequence[str], reference: Images | None = None) -> None:
    """Raise ValueError unless there are as many prompts, and reference pictures where given, as images."""
    if len(prompts) != len(images):
        raise ValueError(f"prompts has {len(prompts)} entries for {len(images)} images; accepted: one per image")
    if reference is not None and len(reference) != len(images):
        raise ValueError(f"reference has {len(reference)} pictures for {len(images)} images; accepted: one per image")
