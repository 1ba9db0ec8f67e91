"""The exact judge of the reference world: finds the objects of a picture and holds them against the prompt.

Objects are connected foreground regions; their colour is the nearest of the palette, their shape the template their
mask overlaps most. `judge` follows GenEval (Ghosh et al. 2023, evaluate_images.py): enough of every thing that is asked
for, exactly as many where the prompt counts, colours and the relation as asked. `dense` gives partial credit instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from ..evaluators import as_array
from .scenes import COLORS, GROUND, MAX_RADIUS, SHAPES, SIZE, Object, Request, Thing, read_prompt, render

_PALETTE = np.array([GROUND, *COLORS.values()], dtype=np.float32)
_NAMES = (None, *COLORS)
_GRID = 24  # templates and masks are compared on this grid
_MIN_AREA = 14  # pixels; less is a speck, not an object
_MIN_IOU = 0.62  # a mask that overlaps every template less has no shape
_MIN_ASPECT = 0.62


@dataclass(frozen=True)
class Found:
    """An object seen in a picture; `shape` is None where it looks like none. Box is (x0, y0, x1, y1) in pixels.

    The mask, bool `(y1 - y0, x1 - x0)`, says which pixels of the box are the object's.
    """

    shape: str | None
    color: str
    box: tuple[int, int, int, int]
    mask: np.ndarray | None = field(default=None, repr=False, compare=False)

    def agrees(self, thing: Thing) -> float:
        """1 for the shape and colour asked for, 0.5 where only one of two is right, else 0."""
        shape = self.shape == thing.shape
        if thing.color is None:
            return float(shape)
        return (shape + (self.color == thing.color)) / 2


def _on_grid(mask: np.ndarray) -> np.ndarray:
    """A cropped mask `(h, w)` on a `(_GRID, _GRID)` grid, by nearest neighbour."""
    rows = ((np.arange(_GRID) + 0.5) * mask.shape[0] / _GRID).astype(int)
    columns = ((np.arange(_GRID) + 0.5) * mask.shape[1] / _GRID).astype(int)
    return mask[rows][:, columns]


def _crop(mask: np.ndarray) -> np.ndarray:
    ys, xs = np.nonzero(mask)
    return mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def _templates() -> np.ndarray:
    middle = SIZE / 2
    drawn = render([[Object(shape, "black", middle, middle, MAX_RADIUS)] for shape in SHAPES], size=SIZE * 4).numpy()
    return np.stack([_on_grid(_crop(image.mean(0) < 0.5)) for image in drawn])  # (shapes, grid, grid)


_TEMPLATES = _templates()


def find_objects(image: np.ndarray) -> list[Found]:
    """The objects of one picture, float `(h, w, 3)` in [0, 1], largest first."""
    if not np.isfinite(image).all():
        return []
    image = image.clip(-1, 2)  # worse than that is not told apart, and huge values would overflow
    # foreground: nearer to the middle between some colour and the ground than to the ground
    foreground = np.linalg.norm(image - _PALETTE[0], axis=-1) > 0.30
    labels = np.empty(foreground.shape, np.int32)
    ndimage.label(foreground, structure=np.ones((3, 3)), output=labels)
    found = []
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[window] == index
        area = int(mask.sum())
        if area < _MIN_AREA:
            continue
        # the rim is mixed with the ground: the colour is voted by the pixels nearest to any palette colour
        near = np.linalg.norm(image[window][mask][:, None] - _PALETTE[1:], axis=-1)  # (pixels, colours)
        votes = near[near.min(1) <= np.median(near.min(1))].argmin(1)
        color = _NAMES[1 + int(np.bincount(votes).argmax())]
        assert color is not None
        height, width = mask.shape
        shape = None
        if min(height, width) / max(height, width) >= _MIN_ASPECT:
            on_grid = _on_grid(mask)
            overlap = (on_grid & _TEMPLATES).sum((1, 2)) / (on_grid | _TEMPLATES).sum((1, 2))
            if overlap.max() >= _MIN_IOU:
                shape = SHAPES[int(overlap.argmax())]
        rows, columns = window
        found.append((area, Found(shape, color, (columns.start, rows.start, columns.stop, rows.stop), mask)))
    return [f for _, f in sorted(found, key=lambda pair: -pair[0])]


def stands(relation: str, a: Found, b: Found) -> bool:
    """GenEval's position rule: the offset of centres, shrunk by a tenth of both sizes, is along the axis by > 0.5."""
    offset, sizes = [], []
    for low, high in ((0, 2), (1, 3)):
        offset.append((a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2)
        sizes.append(a.box[high] - a.box[low] + b.box[high] - b.box[low])
    length = float(np.hypot(*offset))
    if length == 0:
        return False
    dx, dy = (np.sign(d) * max(0.0, abs(d) - 0.1 * s) / length for d, s in zip(offset, sizes, strict=True))
    return bool({"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}[relation])


def judge(objects: list[Found], request: Request) -> bool:
    """Whether the picture is right, by GenEval's rules."""
    if not request.things:
        return False
    matches = [[f for f in objects if f.agrees(thing) == 1.0] for thing in request.things]
    for thing, matched in zip(request.things, matches, strict=True):
        if len(matched) < thing.count or (thing.count > 1 and len(matched) > thing.count):
            return False
    return request.relation is None or any(stands(request.relation, a, b) for a in matches[0] for b in matches[1])


def dense(objects: list[Found], request: Request) -> float:
    """Partial credit in [0, 1]: matched objects, half for shape or colour alone, over max(wanted, found).

    Where a relation is asked for it counts half, and only for objects that are both there.
    """
    wanted = [thing for thing in request.things for _ in range(thing.count)]
    if not wanted or not objects:
        return 0.0
    left, credit = list(objects), 0.0
    for full in (1.0, 0.5):  # exact matches first, so that a half match never takes an exact one's object
        for thing in list(wanted):
            hit = next((f for f in left if f.agrees(thing) == full), None)
            if hit:
                left.remove(hit)
                wanted.remove(thing)
                credit += full
    count = sum(thing.count for thing in request.things)
    score = credit / max(count, len(objects))
    if request.relation is None:
        return score
    return 0.5 * score + 0.5 * judge(objects, request)


class Shapes:
    """Evaluator `shapes`: the dense score of each picture."""

    name = "shapes"
    direction = "maximize"
    needs_reference = False
    rule = staticmethod(dense)

    def score(self, images, prompts: Sequence[str], reference=None) -> np.ndarray:
        """One score in [0, 1] per image, float64 `(n,)`."""
        pictures = as_array(images)
        if len(pictures) != len(prompts):
            raise ValueError(f"images and prompts must be equally many: {len(pictures)} images, {len(prompts)} prompts")
        pairs = zip(pictures, prompts, strict=True)
        return np.array([self.rule(find_objects(p), read_prompt(t)) for p, t in pairs], dtype=np.float64)


class ShapesBinary(Shapes):
    """Evaluator `shapes_binary`: 1 for a right picture, 0 for a wrong one; its mean is GenEval's score."""

    name = "shapes_binary"
    rule = staticmethod(judge)
