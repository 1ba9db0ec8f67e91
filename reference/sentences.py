"""Every sentence of the reference world, and which of them are true of a scene.

For training and measuring scorers: with all that could be said at hand, a picture can be held against every false
sentence, not only against the captions of its neighbours in a batch. True is what the judge calls right. Covered beside
the prompts: the sentences by which a detected object's colour is named, of colours this world does not draw as well.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from ..evaluators.color import TEMPLATES
from ..evaluators.template import COLORS as NAMED_COLORS
from .judge import Found, stands
from .prompts import requests_of
from .scenes import COLORS, KINDS, NUMBERS, RELATIONS, SHAPES, Object, Request, Thing, prompt_of, read_prompt

# colours that an object may be called and never has here; drawn in training alone, so that their names mean something
FOREIGN: dict[str, tuple[float, float, float]] = {
    "pink": (0.98, 0.56, 0.72),
    "brown": (0.45, 0.27, 0.12),
    "white": (1.0, 1.0, 1.0),
}
PALETTE = {**COLORS, **FOREIGN}
assert set(NAMED_COLORS) <= set(PALETTE)


@cache
def sentences() -> tuple[str, ...]:
    """All of them, each once: the prompts of every kind, then the names of colours."""
    said = [prompt_of(request) for kind in KINDS for request in requests_of(kind)]
    said += [t.format(color=c, label=s) for c in PALETTE for s in SHAPES for t in TEMPLATES]
    return tuple(dict.fromkeys(said))


def truths(scenes: Sequence[Sequence[Object]]) -> np.ndarray:
    """Which of `sentences()` are true of each scene, bool `(scenes, sentences)`."""
    shapes, colors = ({name: i for i, name in enumerate(names)} for names in (SHAPES, PALETTE))
    counts = np.zeros((len(scenes), len(SHAPES), len(PALETTE)), np.int8)
    placed = np.zeros((len(scenes), len(RELATIONS), len(SHAPES), len(SHAPES)), bool)
    for i, scene in enumerate(scenes):
        for a in scene:
            counts[i, shapes[a.shape], colors[a.color]] += 1
            for b in scene:
                if a.shape != b.shape:
                    held = [stands(relation, _seen(a), _seen(b)) for relation in RELATIONS]
                    placed[i, :, shapes[a.shape], shapes[b.shape]] |= held

    def there(thing: Thing) -> np.ndarray:
        of_shape = counts[:, shapes[thing.shape]]
        number = of_shape[:, colors[thing.color]] if thing.color else of_shape.sum(1)
        return number >= 1 if thing.count == 1 else number == thing.count

    def true(request: Request) -> np.ndarray:
        holds = np.logical_and.reduce([there(thing) for thing in request.things])
        if request.relation:
            first, second = (shapes[thing.shape] for thing in request.things)
            holds &= placed[:, RELATIONS.index(request.relation), first, second]
        return holds

    named = {t.format(color=c, label=s): (c, s, t) for c in PALETTE for s in SHAPES for t in TEMPLATES}
    columns = []
    for sentence in sentences():
        if sentence in named:
            color, shape, template = named[sentence]
            of_color = counts[:, :, colors[color]]
            columns.append((of_color[:, shapes[shape]] if "{label}" in template else of_color.sum(1)) > 0)
        else:
            columns.append(true(read_prompt(sentence)))
    return np.stack(columns, axis=1)


def altered(request: Request, rng: np.random.Generator) -> dict[str, Request]:
    """`request` with one thing about it changed, by what that is: shape, color, count, relation, or colors swapped."""
    things, relation = request.things, request.relation
    shape = str(rng.choice([s for s in SHAPES if all(s != thing.shape for thing in things)]))
    found = {"shape": Request((replace(things[0], shape=shape), *things[1:]), relation)}
    if things[0].color:
        color = str(rng.choice([c for c in COLORS if all(c != thing.color for thing in things)]))
        found["color"] = Request((replace(things[0], color=color), *things[1:]))
        if len(things) == 2:
            first, second = things
            found["swap"] = Request((replace(first, color=second.color), replace(second, color=first.color)))
    if things[0].count > 1:
        count = int(rng.choice([n for n in NUMBERS.values() if n != things[0].count]))
        found["count"] = Request((replace(things[0], count=count),))
    if relation:
        found["relation"] = Request(things, str(rng.choice([r for r in RELATIONS if r != relation])))
    return found


def _seen(o: Object) -> Found:
    return Found(o.shape, o.color, (o.x - o.radius, o.y - o.radius, o.x + o.radius, o.y + o.radius))  # pyright: ignore[reportArgumentType]
