"""The prompt splits of the reference world: search, confirm and test, disjoint in texts and in seeds.

`python -m blocktune.reference.prompts` rewrites `splits/`, byte for byte the same on every machine. Covered: all six
kinds, equally many of each, in turn, so that the first 6 * k prompts of a split are balanced as well. Where a kind has
fewer texts than a split asks for, texts come again with other seeds.
"""

import json
import random
from itertools import permutations, product
from pathlib import Path

from ..evaluators import Prompt, load_prompts
from ..evaluators.prompts import write_splits
from .scenes import COLORS, KINDS, NUMBERS, RELATIONS, SHAPES, Request, Thing, prompt_of

SPLITS = Path(__file__).parent / "splits"
PER_KIND = {"search": 64, "confirm": 128, "test": 128}
FIRST_SEED = {"search": 1_000_000, "confirm": 2_000_000, "test": 3_000_000}
OPPOSITES = {"right of": "left of", "below": "above"}


def prompts(split: str) -> tuple[Prompt, ...]:
    """The prompts of `split`: 384 for `search`, 768 for `confirm`, 768 for `test`."""
    if split not in PER_KIND:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(PER_KIND)}")
    return load_prompts(SPLITS / f"{split}.jsonl")


def requests_of(kind: str) -> list[Request]:
    """Every request of `kind` in this world, in a fixed order."""
    pairs = list(permutations(SHAPES, 2))
    if kind == "single":
        return [Request((Thing(shape),)) for shape in SHAPES]
    if kind == "colors":
        return [Request((Thing(shape, color),)) for shape, color in product(SHAPES, COLORS)]
    if kind == "counting":
        return [Request((Thing(shape, count=count),)) for shape, count in product(SHAPES, NUMBERS.values())]
    if kind == "two":
        return [Request((Thing(a), Thing(b))) for a, b in pairs]
    if kind == "position":
        return [Request((Thing(a), Thing(b)), relation) for (a, b), relation in product(pairs, RELATIONS)]
    if kind == "attribution":
        colors = permutations(COLORS, 2)
        return [Request((Thing(a, c), Thing(b, d))) for (a, b), (c, d) in product(pairs, colors)]
    raise ValueError(f"kind is {kind!r}; accepted: {', '.join(KINDS)}")


def texts_of(kind: str) -> dict[str, list[str]]:
    """All texts of `kind`, dealt out to the splits in proportion to what they ask for, in a random but fixed order.

    Texts that ask for the same pictures go to one split together: two things in both orders, and also `a circle left of
    a ring` with `a ring right of a circle`.
    """
    groups: dict[object, list[str]] = {}
    for request in requests_of(kind):
        things, relation = request.things, request.relation
        if relation in OPPOSITES:
            things, relation = things[::-1], OPPOSITES[relation]
        meaning = (things, relation) if relation else frozenset(things)
        groups.setdefault(meaning, []).append(prompt_of(request))
    dealt = list(groups.values())
    random.Random(f"blocktune {kind}").shuffle(dealt)  # a string seeds it by its sha512, the same on every machine
    sizes = _shares(len(dealt))
    texts, start = {}, 0
    for split, size in sizes.items():
        texts[split] = [text for group in dealt[start : start + size] for text in group]
        random.Random(f"blocktune {kind} {split}").shuffle(texts[split])
        start += size
    return texts


def _shares(total: int) -> dict[str, int]:
    """`total` groups of texts over the splits, in proportion, but two at least: one text would not stand for a kind."""
    asked = sum(PER_KIND.values())
    shares = {split: max(2, round(total * count / asked)) for split, count in PER_KIND.items()}
    largest = max(PER_KIND, key=PER_KIND.__getitem__)
    shares[largest] += total - sum(shares.values())
    return shares


def make_splits() -> dict[str, tuple[Prompt, ...]]:
    """The prompts of every split, made anew."""
    texts = {kind: texts_of(kind) for kind in KINDS}
    splits = {}
    for split, count in PER_KIND.items():
        turns = [(kind, texts[kind][split][i % len(texts[kind][split])]) for i in range(count) for kind in KINDS]
        splits[split] = tuple(Prompt(text, kind, FIRST_SEED[split] + n) for n, (kind, text) in enumerate(turns))
    return splits


if __name__ == "__main__":
    write_splits(SPLITS, make_splits())
    for name, digest in json.loads((SPLITS / "sha256.json").read_text()).items():
        print(f"{SPLITS / name}.jsonl  {len(prompts(name))} prompts  sha256 {digest}")
