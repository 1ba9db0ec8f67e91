"""The reference world: flat coloured shapes on light grey ground, and the sentences that describe them.

A scene is one to four objects that do not touch; its prompt is one of GenEval's six kinds. Everything is drawn from a
seeded generator, so a (seed, kind) pair always gives the same scene. Covered: sampling scenes, their prompts, reading
a prompt back into what it asks for, and rendering by signed distance functions. Not covered: overlap,
texture, size words.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch

SIZE = 48  # pixels, height and width
GROUND = (0.92, 0.92, 0.92)
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.15, 0.25, 0.88),
    "yellow": (0.96, 0.85, 0.10),
    "purple": (0.58, 0.18, 0.74),
    "orange": (0.98, 0.52, 0.06),
    "cyan": (0.15, 0.80, 0.86),
    "black": (0.08, 0.08, 0.08),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("single", "colors", "counting", "two", "position", "attribution")
MAX_OBJECTS = 4
MIN_RADIUS, MAX_RADIUS, GAP = 5.5, 8.0, 3.0  # pixels


@dataclass(frozen=True)
class Thing:
    """What a prompt asks for: `count` objects of `shape`, of `color` unless that is None."""

    shape: str
    color: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Request:
    """A prompt read back: its things, and for two of them how the first stands to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Object:
    """One drawn object: centre and radius in pixels, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def prompt_of(request: Request) -> str:
    """The sentence of a request, e.g. `a photo of a red circle and a blue square`."""

    def phrase(thing: Thing) -> str:
        color = f"{thing.color} " if thing.color else ""
        if thing.count == 1:
            return f"a {color}{thing.shape}"
        number = next(word for word, n in NUMBERS.items() if n == thing.count)
        return f"{number} {color}{plural(thing.shape)}"

    joint = f" {request.relation} " if request.relation else " and "
    return "a photo of " + joint.join(phrase(thing) for thing in request.things)


_SINGULAR = {plural(shape): shape for shape in SHAPES} | {shape: shape for shape in SHAPES}
_PHRASE = re.compile(
    rf"\b(a|an|one|{'|'.join(NUMBERS)}) (?:({'|'.join(COLORS)}) )?"
    rf"({'|'.join(sorted(_SINGULAR, key=len, reverse=True))})\b"
)


def read_prompt(prompt: str) -> Request:
    """What `prompt` asks for. A sentence that names no shape of this world asks for nothing (no things)."""
    text = prompt.lower()
    found = list(_PHRASE.finditer(text))
    things = tuple(Thing(_SINGULAR[m[3]], m[2], NUMBERS.get(m[1], 1)) for m in found)
    relation = None
    if len(found) == 2:
        between = text[found[0].end() : found[1].start()].strip()
        relation = between if between in RELATIONS else None
    return Request(things, relation)


def sample_request(kind: str, rng: np.random.Generator) -> Request:
    """A random request of one of GenEval's six kinds."""
    shapes = [str(s) for s in rng.permutation(SHAPES)]
    colors = [str(c) for c in rng.permutation(list(COLORS))]
    if kind == "single":
        return Request((Thing(shapes[0]),))
    if kind == "colors":
        return Request((Thing(shapes[0], colors[0]),))
    if kind == "counting":
        return Request((Thing(shapes[0], count=int(rng.integers(2, 5))),))
    if kind == "two":
        return Request((Thing(shapes[0]), Thing(shapes[1])))
    if kind == "position":
        return Request((Thing(shapes[0]), Thing(shapes[1])), str(rng.choice(RELATIONS)))
    if kind == "attribution":
        return Request((Thing(shapes[0], colors[0]), Thing(shapes[1], colors[1])))
    raise ValueError(f"kind is {kind!r}; accepted: {', '.join(KINDS)}")


def sample_scene(request: Request, rng: np.random.Generator, gap: float = GAP) -> list[Object]:
    """Objects that fulfil `request`, unnamed colours drawn freely, placed at least `gap` pixels apart: none touch."""
    wanted: list[tuple[str, str]] = []
    for thing in request.things:
        color = thing.color or str(rng.choice(list(COLORS)))
        wanted += [(thing.shape, color)] * thing.count
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in wanted:
            for _ in range(40):
                radius = float(rng.uniform(MIN_RADIUS, MAX_RADIUS if len(wanted) < 4 else 7.0))
                margin = radius + 1.5
                x, y = (float(v) for v in rng.uniform(margin, SIZE - margin, 2))
                # shapes reach at most `radius` along each axis, so a gap in one axis is a gap
                if all(max(abs(x - px), abs(y - py)) > radius + pr + gap for px, py, pr in placed):
                    placed.append((x, y, radius))
                    break
            else:
                break
        if len(placed) == len(wanted) and (not request.relation or _stands(request.relation, placed[0], placed[1])):
            return [Object(s, c, *p) for (s, c), p in zip(wanted, placed, strict=True)]


def _stands(relation: str, a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    """Whether a is clearly `relation` b: within 35 degrees of the axis."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 0 and abs(across) < 0.7 * along


def render(scenes: list[list[Object]], size: int = SIZE, device: str | torch.device = "cpu") -> torch.Tensor:
    """Draw scenes with one-pixel anti-aliasing: float32 `(n, 3, size, size)` in [0, 1]."""
    return draw(tabulate(scenes).to(device), size)


def tabulate(scenes: list[list[Object]]) -> torch.Tensor:
    """Scenes as float32 `(n, MAX_OBJECTS, 7)`: x, y, radius, index of the shape, r, g, b; radius 0 where none is."""
    table = torch.zeros(len(scenes), MAX_OBJECTS, 7)
    for row, scene in zip(table.numpy(), scenes, strict=True):
        for place, o in zip(row, scene, strict=False):
            place[:] = (o.x, o.y, o.radius, SHAPES.index(o.shape), *COLORS[o.color])
    return table


def draw(table: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """The pictures of `tabulate`'s rows, on their device: float32 `(n, 3, size, size)` in [0, 1].

    Signed distances after Inigo Quilez, "2D distance functions" (iquilezles.org/articles/distfunctions2d).
    """
    n, device = len(table), table.device
    axis = (torch.arange(size, device=device) + 0.5) * (SIZE / size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    # filled, not copied from the host: a copy could not be part of a CUDA graph
    image = torch.stack([torch.full((n, size, size), level, device=device) for level in GROUND], dim=1)
    for j in range(MAX_OBJECTS):
        ox, oy, r, shape = (table[:, j, k].view(n, 1, 1) for k in range(4))
        px, py = x - ox, y - oy
        distances = torch.stack([_DISTANCE[name](px, py, r) for name in SHAPES])  # (shapes, n, size, size)
        distance = distances.gather(0, shape.long().view(1, n, 1, 1).expand(1, n, size, size))[0]
        cover = (0.5 - distance * (size / SIZE)).clamp(0, 1) * (r > 0)
        image = torch.lerp(image, table[:, j, 4:].view(n, 3, 1, 1).expand_as(image), cover.unsqueeze(1))
    return image


def _box(px, py, w, h):
    qx, qy = px.abs() - w, py.abs() - h
    return torch.hypot(qx.clamp(min=0), qy.clamp(min=0)) + torch.maximum(qx, qy).clamp(max=0)


def _triangle(px, py, r):
    # isosceles, apex up, as wide as high: the larger of the distances to its three edge lines (exact but at corners)
    slope = math.hypot(1.0, 2.0)
    return torch.maximum((2 * px.abs() - (py + r)) / slope, py - r)


_DISTANCE = {
    "circle": lambda px, py, r: torch.hypot(px, py) - r,
    "square": lambda px, py, r: _box(px, py, r * 0.88, r * 0.88),
    "triangle": _triangle,
    "cross": lambda px, py, r: torch.minimum(_box(px, py, r, r * 0.32), _box(px, py, r * 0.32, r)),
    "ring": lambda px, py, r: (torch.hypot(px, py) - r * 0.74).abs() - r * 0.26,
    "diamond": lambda px, py, r: (px.abs() + py.abs() - r) / math.sqrt(2.0),
}
