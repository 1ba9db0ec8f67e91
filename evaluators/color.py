"""The colour of a detected object by zero-shot CLIP, as GenEval names it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .clip import check_clip, load_clip
from .detection import Detection
from .template import COLORS

GROUND = (153, 153, 153)  # #999, painted over what is not the object
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


class ColorNamer:
    """The nearest of ten colours: their vectors are the means of three sentences each, made of the object's class."""

    def __init__(self, clip: str):
        check_clip(clip)
        self.clip = clip
        self._colors: dict[str, np.ndarray] = {}

    def name(self, picture: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """One of `COLORS` per detection, of its box cut out of `picture`; the first of equally near ones."""
        if not detections:
            return []
        vectors = load_clip(self.clip).images([crop(picture, d) for d in detections]).double().numpy()  # (n, dim)
        near = [self.of_label(d.label) @ vector for d, vector in zip(detections, vectors, strict=True)]
        return [COLORS[int(similarity.argmax())] for similarity in near]

    def of_label(self, label: str) -> np.ndarray:
        """`(colours, dim)`, of length 1 each."""
        if label not in self._colors:
            texts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            vectors = load_clip(self.clip).texts(texts).double().numpy()
            means = vectors.reshape(len(COLORS), len(TEMPLATES), -1).mean(axis=1)
            self._colors[label] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return self._colors[label]


def crop(picture: Image.Image, detection: Detection) -> Image.Image:
    """The detection's box, at least a pixel each way, with everything outside of its mask painted grey."""
    if detection.mask is not None:
        ground = Image.new("RGB", picture.size, GROUND)
        picture = Image.composite(picture, ground, Image.fromarray(detection.mask))
    x0, y0, x1, y1 = (round(edge) for edge in detection.box)
    return picture.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
