"""Pictures as models take them: PIL, RGB, 8 bits, and only those in order."""

import numpy as np
from PIL import Image

from .evaluator import Images, image_pixels
from .sanity import Sane


def as_picture(image: Image.Image | np.ndarray) -> Image.Image | None:
    """An RGB picture of 8 bits, floats clipped to [0, 1] and rounded; None for one with NaN or inf, or no pixels."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = image_pixels(image)
    if pixels.dtype == np.uint8 and pixels.size:
        return Image.fromarray(pixels)
    if pixels.size == 0 or not np.isfinite(pixels).all():
        return None
    return Image.fromarray(np.uint8(np.round(pixels.clip(0, 1) * 255)))


def sane_pictures(images: Images) -> dict[int, Image.Image]:
    """By their position, the pictures that `sane` finds in order: models give black, NaN or flat ones any score."""
    sane = Sane().score(images, [""] * len(images))
    found = {i: as_picture(image) for i, image in enumerate(images) if sane[i]}
    return {i: picture for i, picture in found.items() if picture is not None}
