"""GenEval's sentences, written and read: `a photo of two red cups`, `a photo of a dog left of a bench`.

The words are those of Ghosh et al. 2023 (arXiv 2310.11513, prompts/create_prompts.py), plain plurals (`four benchs`)
included. What a sentence asks for is GenEval's own metadata, a dict of tag, include, exclude and prompt.
"""

import re
from typing import Any

# the 80 classes of COCO in their order, by GenEval's names
_COCO = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
CLASSES = tuple(_COCO.split(", "))
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
_DIGITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: n for n, word in enumerate(_DIGITS, 1)}
ACCEPTED = "accepted: 'a photo of ' and one thing, two joined by 'and', or two joined by " + ", ".join(RELATIONS)

_IRREGULAR = {"knife": "knives", "computer mouse": "computer mice", "person": "people", "sheep": "sheep"}


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    return name + ("es" if re.search(r"(s|x|ch|sh)$", name) else "s")


_SINGULAR = {form: name for name in CLASSES for form in (name + "es" * (name[-1] == "s"), name + "s", plural(name))}


def metadata_of(text: str) -> dict[str, Any]:
    """What a sentence of the template asks for, as a line of GenEval's metadata file. ValueError for any other text."""
    asked = re.fullmatch(r"a (?:photo|picture) of (.+)", text.strip().rstrip("."))
    parts = re.split(rf" ({'|'.join(RELATIONS)}|and) ", asked[1]) if asked else []
    things = [_thing(part, text) for part in parts[::2]]
    if len(things) not in (1, 2):
        raise ValueError(f"prompt is {text!r}; {ACCEPTED}")
    metadata: dict[str, Any] = {"tag": _tag(parts, things), "include": things, "prompt": text}
    if metadata["tag"] == "position":  # the target comes first, and the thing placed refers to it
        metadata["include"] = [things[1], {**things[0], "position": [parts[1], 0]}]
    counted = [thing for thing in things if thing["count"] > 1]
    if counted:  # exactly so many
        metadata["exclude"] = [{"class": thing["class"], "count": thing["count"] + 1} for thing in counted]
    return metadata


def _thing(words: str, text: str) -> dict[str, Any]:
    first, _, rest = words.partition(" ")
    if not rest or first not in ("a", "an", *NUMBERS):
        raise ValueError(f"prompt is {text!r}, in which {words!r} is no thing; {ACCEPTED}")
    count = NUMBERS.get(first, 1)
    color, _, name = rest.partition(" ")
    if color not in COLORS or not name:  # `an orange` is the fruit
        color, name = None, rest
    if count > 1:
        name = _SINGULAR.get(name, re.sub(r"(ss|x|ch|sh)es$|s$", r"\1", name))
    return {"class": name, "count": count} | ({"color": color} if color else {})


def _tag(parts: list[str], things: list[dict[str, Any]]) -> str:
    colored = any("color" in thing for thing in things)
    if len(things) == 2:
        return "position" if parts[1] in RELATIONS else "color_attr" if colored else "two_object"
    if things[0]["count"] > 1:
        return "counting"
    return "colors" if colored else "single_object"
