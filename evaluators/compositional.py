"""The prompt set that ships: everyday things with colours, shapes, textures, counts, places and two colours at once.

`python -m blocktune.evaluators.compositional` rewrites `splits/`, byte for byte the same on every machine. The three
splits share no text, no meaning (`a cup left of a bowl` is `a bowl right of a cup`) and no seed. All six kinds come in
turn, so that the first 6 * k prompts of a split are balanced as well. The sentences begin with `a picture of`, as no
sentence of GenEval does, but ask for what some of GenEval's ask for: a benchmark run afterwards is not wholly unseen.
"""

import json
import random
from itertools import combinations, permutations, product
from pathlib import Path

from .prompts import Prompt, load_prompts, write_splits
from .template import COLORS, NUMBERS, RELATIONS, plural, with_article

SPLITS = Path(__file__).parent / "splits"
PER_KIND = {"search": 64, "confirm": 128, "test": 128}
FIRST_SEED = {"search": 11_000_000, "confirm": 12_000_000, "test": 13_000_000}
_OPPOSITE = {"right of": "left of", "below": "above"}

# of COCO's classes those that are seen whole, counted easily, and come in many colours
_THINGS = (
    "bicycle, car, motorcycle, airplane, bus, train, truck, boat, fire hydrant, stop sign, parking meter, bench, "
    "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, "
    "frisbee, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine "
    "glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, carrot, hot dog, pizza, donut, cake, "
    "chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, "
    "cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, teddy bear, toothbrush"
)
THINGS = tuple(_THINGS.split(", "))
SHAPES = ("round", "square", "oval", "rectangular", "triangular", "hexagonal", "heart-shaped", "star-shaped")
_SHAPED = ("clock", "dining table", "cake", "mirror", "plate", "pillow", "rug", "box", "tray", "window", "lamp", "bowl")
TEXTURES = ("wooden", "metal", "glass", "leather", "plastic", "rubber", "fabric", "ceramic", "stone", "fluffy")
_TEXTURED = ("bench", "chair", "bowl", "cup", "spoon", "vase", "suitcase", "handbag", "couch", "box", "lamp", "toy car")


def prompts(split: str) -> tuple[Prompt, ...]:
    """The prompts of `split`: 384 for `search`, 768 for `confirm`, 768 for `test`."""
    if split not in PER_KIND:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(PER_KIND)}")
    return load_prompts(SPLITS / f"{split}.jsonl")


def meanings() -> dict[str, list[list[str]]]:
    """All texts by kind; texts that ask for the same picture stand in one list."""

    def pairs(words: tuple[str, ...], things: tuple[str, ...]) -> list[list[str]]:
        chosen = product(combinations(things, 2), permutations(words, 2))
        both = [(with_article(f"{v} {a}"), with_article(f"{w} {b}")) for (a, b), (v, w) in chosen]
        return [[f"{first} and {second}", f"{second} and {first}"] for first, second in both]

    relations: dict[tuple[str, str, str], list[str]] = {}
    for (a, b), relation in product(permutations(THINGS, 2), RELATIONS):
        key = (b, _OPPOSITE[relation], a) if relation in _OPPOSITE else (a, relation, b)
        relations.setdefault(key, []).append(f"{with_article(a)} {relation} {with_article(b)}")
    counts = [number for number, n in NUMBERS.items() if 2 <= n <= 6]
    return {
        "colors": [[with_article(f"{color} {thing}")] for color, thing in product(COLORS, THINGS) if color != thing],
        "shape": pairs(SHAPES, _SHAPED),
        "texture": pairs(TEXTURES, _TEXTURED),
        "counting": [[f"{number} {plural(thing)}"] for number, thing in product(counts, THINGS)],
        "position": list(relations.values()),
        "attribution": pairs(COLORS, THINGS),
    }


def make_splits() -> dict[str, tuple[Prompt, ...]]:
    """The prompts of every split, made anew."""
    texts: dict[str, dict[str, list[str]]] = {}
    for kind, groups in meanings().items():
        shuffled = random.Random(f"blocktune compositional {kind}")  # a string seeds it the same on every machine
        shuffled.shuffle(groups)
        chosen = iter([shuffled.choice(group) for group in groups[: sum(PER_KIND.values())]])
        texts[kind] = {split: [next(chosen) for _ in range(count)] for split, count in PER_KIND.items()}
    splits = {}
    for split, count in PER_KIND.items():
        turns = [(kind, texts[kind][split][i]) for i in range(count) for kind in texts]
        first = FIRST_SEED[split]
        splits[split] = tuple(Prompt(f"a picture of {text}", kind, first + n) for n, (kind, text) in enumerate(turns))
    return splits


if __name__ == "__main__":
    write_splits(SPLITS, make_splits())
    for name, digest in json.loads((SPLITS / "sha256.json").read_text()).items():
        print(f"{SPLITS / name}.jsonl  {len(prompts(name))} prompts  sha256 {digest}")
