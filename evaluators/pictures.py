"""Pictures for models: PIL, and only those in order; batches of one size."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from .evaluator import Images, image_array
from .sanity import Sane


def sane_pictures(images: Images) -> list[Image.Image | None]:
    """Each picture as 8-bit PIL, or None where `sane` scores 0: models give black, NaN or flat ones any score."""
    sane = Sane().score(images, [""] * len(images))
    return [
        Image.fromarray((image_array(image).clip(0, 1) * 255).round().astype(np.uint8)) if ok else None
        for image, ok in zip(images, sane, strict=True)
    ]


def batches(pictures: Sequence[Image.Image], size: int) -> Iterator[list[int]]:
    """Indices of `pictures`, at most `size` at a time, of one width and height, so that none is padded to another."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, picture in enumerate(pictures):
        by_size.setdefault(picture.size, []).append(i)
    for indices in by_size.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
