"""The rules of T2I-CompBench++ (Huang et al. 2023 and 2025, github.com/Karine-Huang/T2I-CompBench), as pure functions.

What models saw comes in as detections, depths and probabilities; `t2i_evaluators` runs the models. The quirks of the
released code are kept, each named where it is. Where that code fails (no noun, no known object, boxes without area) the
score is 0.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from .detection import Detection
from .phrases import Phrases

MAX_CHUNKS = 8
FRAME = (479, 480)  # pixels: the shorter and, at most, the longer side of pictures as detected; boxes are in this frame
NEAR = 150  # pixels of that frame
OVERLAP, OVERLAP_3D = 0.1, 0.5
RELATIONS = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
RELATIONS_3D = ("in front of", "behind", "hidden")
COUNTS = {"a": 1, "an": 1} | {
    word: n for n, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight"), 1)
}
# what can be counted: the benchmark's list, new_objects.txt
_COUNTABLE = (
    "bottle, cup, cake, bird, knife, microwave, desk, book, helmet, pillow, bowl, flag, stool, toy, pen, "
    "microphone, bread, fish, camera, candle, paddle, drum, guitar, tomato, tent, kite, lemon, strawberry, "
    "suitcase, pear, printer, duck, hamburger, deer, egg, ship, chicken, peach, helicopter, swan, camel, goldfish, "
    "shrimp, banana, balloon, giraffe, frog, horse, man, rabbit, bicycle, bee, girl, mouse, painting, lamp, cow, "
    "train, vase, pig, sheep, airplane, woman, phone, boy, plate, computer, couch, turtle, bag, car, backpack, dog, "
    "television, butterfly, cat, person, table, sofa, key, refrigerator, clock, chair, truck, boat, bear, sink, "
    "apple"
)
_PLURALS = {
    **{"knife": "knives", "fish": "fish", "goldfish": "goldfish", "deer": "deer", "shrimp": "shrimp"},
    **{"sheep": "sheep", "tomato": "tomatoes", "strawberry": "strawberries", "peach": "peaches", "man": "men"},
    **{"woman": "women", "mouse": "mice", "couch": "couches", "butterfly": "butterflies", "person": "people"},
}
COUNTABLE = {name: _PLURALS.get(name, name + "s") for name in _COUNTABLE.split(", ")}
_ONE = {plural: name for name, plural in COUNTABLE.items()}
_PEOPLE = ("girl", "boy", "man", "woman")
_DETECTED = {**dict.fromkeys(_PEOPLE, "person"), "ship": "boat", "goldfish": "fish", "painting": "picture"}


def questions(phrases: Phrases) -> list[str]:
    """What BLIP-VQA is asked: `a red apple?` for each of the first 8 noun chunks, places such as `top` left out."""
    chunks = [chunk for chunk in phrases.chunks if chunk not in ("top", "the side", "the left", "the right")]
    asked = [re.sub(r'[.!"()*#:;~]', "", f"{chunk}?".lower()).rstrip(" ") for chunk in chunks[:MAX_CHUNKS]]
    return [" ".join(question.split(" ")[:50]) for question in asked]


def attribute(probabilities: Sequence[float]) -> float:
    """Colour, shape, texture: the product of P(yes) over the questions. Quirk: a prompt without chunks scores 1.

    The original passes each factor and the product through text of four decimals. That is left out: a score would jump
    by 0.0001 where a model's rounding differs.
    """
    return float(np.prod(np.asarray(probabilities, dtype=np.float64)))


def relation_of(prompt: str, relations: Sequence[str] = RELATIONS) -> str | None:
    """The first of `relations` that stands anywhere in the text. Quirk: also inside of a word, as near in linear."""
    return next((relation for relation in relations if relation in prompt), None)


def ends_of(phrases: Phrases) -> tuple[str, str] | None:
    """What a simple prompt places and where: its first and its last noun, people of any kind as `person`."""
    nouns = phrases.nouns
    return (_person(nouns[0]), _person(nouns[-1])) if nouns else None


def ends_around(phrases: Phrases) -> tuple[str, str] | None:
    """The same for a sentence of the complex category: the nearest nouns in front of and behind its preposition.

    None unless there are exactly two. Quirks: `on the top of` is none of the prepositions, and a proper noun behind
    counts only where no noun stands behind, and not as the last word.
    """
    prepositions = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
    words, tags, ends = phrases.words, phrases.tags, []
    for i in range(len(words)):
        length = next((n for n in (3, 2, 1) if " ".join(words[i : i + n]) in prepositions), 0)
        if not length:
            continue
        front = next((words[j] for j in range(i - 1, -1, -1) if tags[j] in ("NOUN", "PROPN")), None)
        after = range(i + length, len(words))
        behind = next((words[j] for j in after if tags[j] == "NOUN"), None)
        if behind is None:
            behind = next((words[j] for j in after[:-1] if tags[j] == "PROPN" and tags[j + 1] != "PROPN"), None)
        ends += [end for end in (front, behind) if end is not None]
    return (_person(ends[0]), _person(ends[1])) if len(ends) == 2 else None


def spatial(relation: str | None, ends: tuple[str, str] | None, detections: Sequence[Detection]) -> float:
    """2D relations: a quarter of each object's score and half of how it stands; below 0.5 the score is 0.

    Boxes are in the frame of `FRAME`, an object is the best detection of exactly its name.
    """
    found = _best(detections)
    first, second = (next((d for d in found if d.label == end), None) for end in ends or (None, None))
    score = _quarters(first, second)
    if first is not None and second is not None:
        score += placed(relation, first, second) / 2
    return score if score >= 0.5 else 0.0


def spatial_3d(
    relation: str | None, ends: tuple[str, str] | None, detections: Sequence[Detection], depth: np.ndarray
) -> float:
    """In front of, behind, hidden by: as `spatial`, but the overlap and the depth decide, and nothing is cut off.

    `depth` is `(h, w)` of the frame, larger where nearer. Quirks: an object is any detection whose name contains its
    name; while one object is missing, later detections of the other replace earlier ones.
    """
    found = _best(detections)
    both = ends is not None and all(any(end in d.label for d in found) for end in ends)
    pair: list[Detection | None] = [None, None]
    for detection in found:
        for i, end in enumerate(ends or ()):
            if end in detection.label and (both or pair[i] is None):
                pair[i] = detection
        if None not in pair:
            break
    first, second = pair
    score = _quarters(first, second)
    if first is not None and second is not None:
        score += placed_in_depth(relation, first, second, depth) / 2
    return score


def placed(relation: str | None, a: Detection, b: Detection) -> float:
    """How well `a` stands to `b`, in [0, 1].

    A side needs the offset of centres to be longer along its axis than across, and an overlap (IoU) below 0.1; more
    overlap earns 0.1 / IoU. Nearness needs less than 150 pixels on either axis (quirk: one is enough), or earns 150 /
    the longer offset. Quirk: `on top of` is read as a relation but never earns anything.
    """
    dx, dy = ((b.box[i] + b.box[i + 2] - a.box[i] - a.box[i + 2]) / 2 for i in (0, 1))
    if relation in ("next to", "on side of", "near"):
        return 1.0 if abs(dx) < NEAR or abs(dy) < NEAR else NEAR / max(abs(dx), abs(dy))
    along = {"on the right of": -dx, "on the left of": dx, "on the bottom of": -dy, "on the top of": dy}
    if relation not in along:
        return 0.0
    across = dy if relation in ("on the right of", "on the left of") else dx
    if along[relation] <= abs(across):
        return 0.0
    overlap = iou(a, b)
    return 1.0 if overlap < OVERLAP else OVERLAP / overlap


def placed_in_depth(relation: str | None, a: Detection, b: Detection, depth: np.ndarray) -> float:
    """1 where boxes overlap by more than 0.5 (IoU) and mean depths are in order, IoU / 0.5 where they overlap less.

    Quirks: an overlap of exactly 0.5 earns nothing, and depth is read with x for rows and y for columns, so that it is
    the picture's mirror image at its diagonal.
    """
    nearer = [_mean(depth, detection) for detection in (a, b)]
    ordered = nearer[0] > nearer[1] if relation == "in front of" else nearer[0] < nearer[1]
    overlap = iou(a, b)
    if relation not in RELATIONS_3D or not ordered or overlap == OVERLAP_3D:
        return 0.0
    return min(overlap / OVERLAP_3D, 1.0)


def counted(words: Sequence[str]) -> list[tuple[str, int]]:
    """What a numeracy prompt counts: `[("apple", 4)]`. Quirk: numbers up to eight, and right after it a listed noun."""
    asked = []
    for number, name in pairwise(words):
        if number not in COUNTS:
            continue
        if name in COUNTABLE and COUNTS[number] == 1:
            asked.append((name, 1))
        elif name in _ONE:
            asked.append((_ONE[name], COUNTS[number]))
    return asked


def names_of(asked: Sequence[tuple[str, int]]) -> list[str]:
    """The detector's names of what is counted. Quirk: a television stays one, though the detector knows it as a tv."""
    return [_DETECTED.get(word, word) for word, _ in asked]


def numeracy(asked: Sequence[tuple[str, int]], detections: Sequence[Detection]) -> float:
    """Each object asked for earns half for being there and half for the right count, over how many are asked for.

    Detections of one name that overlap or hold each other by more than 0.9 are one. Quirk: where none has an object's
    name, all whose names contain it take that name, for the objects asked for after it too.
    """
    if not asked:
        return 0.0
    kept: list[Detection] = []
    for detection in _best(detections):
        if not any(detection.label == other.label and _same(detection, other) for other in kept):
            kept.append(detection)
    names = [detection.label for detection in kept]
    credit = 0.0
    for name, (_, count) in zip(names_of(asked), asked, strict=True):
        if name not in names:
            names = [name if name in other else other for other in names]
        credit += (0.5 if name in names else 0.0) + (0.5 if names.count(name) == count else 0.0)
    return credit / len(asked)


def without_adjectives(phrases: Phrases) -> str:
    """What CLIP is asked in the complex category. Quirk: a space between all words, also before punctuation."""
    return " ".join(word for word, tag in zip(phrases.words, phrases.tags, strict=True) if tag != "ADJ")


def three_in_one(attribute: float, spatial: float, action: float, list_of: str | None) -> float:
    """The complex category: the mean of the attribute score and of those its prompt is listed for.

    `list_of` is `spatial` or `action` for prompts of complex_val_spatial.txt or complex_val_action.txt, None for the
    rest, which have all three. `action` is CLIP's similarity.
    """
    parts = {"spatial": (attribute, spatial), "action": (attribute, action)}
    scores = parts.get(list_of or "", (attribute, spatial, action))
    return sum(scores) / len(scores)


def frame_scale(width: int, height: int) -> float:
    """Pixels of the frame per pixel of a picture: 479 on the shorter side, 480 at most on the longer."""
    return min(FRAME[0] / min(width, height), FRAME[1] / max(width, height))


def iou(a: Detection, b: Detection) -> float:
    """Intersection over union of two boxes; 0 where there is no area."""
    inside = _inside(a, b, 0)
    union = _area(a, 0) + _area(b, 0) - inside
    return inside / union if union > 0 else 0.0


def _same(a: Detection, b: Detection) -> bool:
    inside = _inside(a, b, 1)  # a pixel more on each side, unlike iou
    areas = _area(a, 1), _area(b, 1)
    return max(inside / (sum(areas) - inside), inside / areas[0], inside / areas[1]) > 0.9


def _inside(a: Detection, b: Detection, pixel: int) -> float:
    sides = [min(a.box[i + 2], b.box[i + 2]) - max(a.box[i], b.box[i]) + pixel for i in (0, 1)]
    return max(sides[0], 0) * max(sides[1], 0)


def _area(detection: Detection, pixel: int) -> float:
    x0, y0, x1, y1 = detection.box
    return (x1 - x0 + pixel) * (y1 - y0 + pixel)


def _mean(depth: np.ndarray, detection: Detection) -> float:
    x0, y0, x1, y1 = (int(edge) for edge in detection.box)
    window = depth[x0:x1, y0:y1]
    return float(window.mean()) if window.size else float("nan")  # nan is in no order


def _best(detections: Sequence[Detection]) -> list[Detection]:
    return sorted(detections, key=lambda detection: -detection.score)


def _person(noun: str) -> str:
    return "person" if noun in _PEOPLE else noun


def _quarters(*found: Detection | None) -> float:
    return sum(0.25 * detection.score for detection in found if detection is not None)
