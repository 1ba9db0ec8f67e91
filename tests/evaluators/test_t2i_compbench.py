"""T2I-CompBench's rules on detections, depths and probabilities written by hand, quirks included."""

import numpy as np
import pytest
from blocktune.evaluators.detection import Detection
from blocktune.evaluators.phrases import Phrases, built_in
from blocktune.evaluators.t2i_compbench import (
    RELATIONS_3D,
    attribute,
    counted,
    ends_around,
    ends_of,
    frame_scale,
    iou,
    numeracy,
    placed,
    placed_in_depth,
    questions,
    relation_of,
    spatial,
    spatial_3d,
    three_in_one,
    without_adjectives,
)
from hypothesis import given
from hypothesis import strategies as st


def seen(label: str, x: float, y: float, w: float = 100, h: float = 100, score: float = 1.0) -> Detection:
    return Detection(label, (x, y, x + w, y + h), score)


CAT, DOG = seen("cat", 0, 0), seen("dog", 300, 0)


# attributes


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("a green bench and a blue bowl", ["a green bench?", "a blue bowl?"]),
        ("A bathroom with white tile and a beige toilet.", ["a bathroom?", "white tile?", "a beige toilet?"]),
        ("a cat on the left of a dog", ["a cat?", "a dog?"]),  # `the left` is no thing
        ("a cat on top of a dog", ["a cat?", "a dog?"]),
        ("", []),
        (" and ".join(["a cat"] * 9), ["a cat?"] * 8),  # eight at most
    ],
)
def test_questions(text, asked):
    assert questions(built_in(text)) == asked


def test_questions_are_written_as_blip_reads_them():
    phrases = Phrases((), (), ('A "Red" #Cat (big): ~x;*!.', " ".join(["very"] * 60)))
    assert questions(phrases) == ["a red cat big x?", " ".join(["very"] * 50)]


@pytest.mark.parametrize(
    ("probabilities", "score"),
    [
        ([0.5, 0.5], 0.25),
        ([1, 1, 1], 1),
        ([0.9, 0], 0),
        ([], 1),  # quirk: nothing asked, nothing wrong
        ([0.00004], 0.00004),  # not cut to four decimals
    ],
)
def test_attribute(probabilities, score):
    assert attribute(probabilities) == pytest.approx(score)


# relations


@pytest.mark.parametrize(
    ("prompt", "relation"),
    [
        ("a cat on the left of a dog", "on the left of"),
        ("a cat next to a dog", "next to"),
        ("a cat on side of a dog", "on side of"),
        ("a cat on top of a dog", "on top of"),
        ("a linear cat on the left of a dog", "near"),  # quirk
        ("a cat next to a dog near a cup", "next to"),  # the first of the list, not of the sentence
        ("a cat", None),
        ("", None),
    ],
)
def test_relation_of(prompt, relation):
    assert relation_of(prompt) == relation


@pytest.mark.parametrize(
    ("prompt", "ends"),
    [
        ("a cat on the left of a dog", ("cat", "dog")),
        ("a girl on the top of a frog", ("person", "frog")),
        ("a key on the bottom of a woman", ("key", "person")),
        ("a cat", ("cat", "cat")),
        ("", None),
    ],
)
def test_ends_of_a_simple_prompt(prompt, ends):
    assert ends_of(built_in(prompt)) == ends


def tagged(text: str) -> Phrases:
    words, tags = zip(*(word.split("/") for word in text.split()), strict=True)
    return Phrases(words, tags, ())


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("The/DET hat/NOUN was/AUX on/ADP top/NOUN of/ADP the/DET rack/NOUN", ("hat", "rack")),
        ("The/DET girl/NOUN next/ADV to/ADP the/DET rack/NOUN", ("person", "rack")),
        ("hat/NOUN on/ADP the/DET left/NOUN of/ADP rack/NOUN", ("hat", "rack")),
        ("hat/NOUN on/ADP the/DET top/NOUN of/ADP rack/NOUN", None),  # quirk: none of the prepositions
        ("hat/NOUN near/ADP Paris/PROPN today/ADV", ("hat", "Paris")),
        ("hat/NOUN near/ADP Paris/PROPN", None),  # quirk: a name as the last word is not seen
        ("hat/NOUN near/ADP Paris/PROPN bridge/NOUN", ("hat", "bridge")),
        ("hat/NOUN near/ADP rack/NOUN near/ADP cup/NOUN", None),  # two prepositions name four ends
        ("near/ADP rack/NOUN near/ADP", ("rack", "rack")),  # though by chance
        ("hat/NOUN", None),
    ],
)
def test_ends_around_a_preposition(text, ends):
    assert ends_around(tagged(text)) == ends


@pytest.mark.parametrize(
    ("relation", "a", "b", "score"),
    [
        ("on the left of", CAT, DOG, 1),
        ("on the right of", CAT, DOG, 0),
        ("on the right of", DOG, CAT, 1),
        ("on the top of", CAT, DOG, 0),
        ("on the top of", CAT, seen("dog", 0, 300), 1),
        ("on the bottom of", seen("dog", 0, 300), CAT, 1),
        ("on the left of", CAT, seen("dog", 300, 300), 0),  # as far across as along: neither
        ("on the left of", CAT, seen("dog", 301, 300), 1),
        ("on the left of", CAT, CAT, 0),
        ("on the left of", CAT, seen("dog", 50, 0), 0.1 / (5000 / 15000)),  # IoU a third
        ("on the left of", CAT, seen("dog", 90, 0), 1),  # IoU 1 / 19
        ("on the left of", CAT, seen("dog", 80, 25, 20, 50), 1),  # IoU 0.1: 0.1 / 0.1
        ("on the left of", CAT, seen("dog", 75, 25, 25, 50), 0.8),  # IoU 0.125
        ("on top of", CAT, seen("dog", 0, 300), 0),  # quirk: never earns
        ("near", CAT, DOG, 1),  # quirk: 300 apart on one axis, but level on the other
        ("near", CAT, seen("dog", 300, 149), 1),
        ("near", CAT, seen("dog", 150, 150), 1),  # 150 / 150
        ("near", CAT, seen("dog", 300, 200), 0.5),
        ("next to", CAT, seen("dog", 200, 600), 0.25),
        ("on side of", CAT, CAT, 1),
        (None, CAT, DOG, 0),
        ("above", CAT, DOG, 0),
    ],
)
def test_placed(relation, a, b, score):
    assert placed(relation, a, b) == pytest.approx(score)


@pytest.mark.parametrize(
    ("detections", "score"),
    [
        ([CAT, DOG], 1),
        ([seen("cat", 0, 0, score=0.6), seen("dog", 300, 0, score=0.8)], 0.85),
        ([seen("dog", 300, 0, score=0.8), seen("cat", 0, 0, score=0.6)], 0.85),  # their order is the scores'
        ([seen("cat", 300, 0, score=0.5), seen("dog", 0, 0, score=0.9)], 0),  # 0.35 is cut off
        ([seen("cat", 300, 0), seen("dog", 0, 0)], 0.5),  # half of nothing but surely there
        ([CAT], 0),
        ([DOG], 0),
        ([], 0),
        ([seen("wildcat", 0, 0), DOG], 0),  # names match as a whole
        ([seen("cat", 600, 0, score=0.4), CAT, DOG], 1),  # the surest cat
        ([CAT, seen("cat", 600, 0), DOG], 1),  # a tie: the first
    ],
)
def test_spatial(detections, score):
    assert spatial("on the left of", ("cat", "dog"), detections) == pytest.approx(score)


def test_spatial_without_ends_or_with_one_thing_twice():
    assert spatial("near", None, [CAT, DOG]) == 0
    assert spatial("near", ("cat", "cat"), [CAT]) == 1  # the very same cat is near itself


# depth


def depth_of(a: float, b: float) -> np.ndarray:
    """`(480, 480)`: `a` in rows up to 100, `b` below. Read with x for rows: `a` at the left."""
    depth = np.full((480, 480), b)
    depth[:100] = a
    return depth


OVER = seen("dog", 50, 0, 100, 100)  # IoU with CAT a third, its left half in the first 100


@pytest.mark.parametrize(
    ("relation", "b", "depth", "score"),
    [
        ("in front of", OVER, depth_of(1, 0), 2 / 3),
        ("behind", OVER, depth_of(1, 0), 0),
        ("behind", OVER, depth_of(0, 1), 2 / 3),
        ("hidden", OVER, depth_of(0, 1), 2 / 3),
        ("in front of", OVER, depth_of(1, 0).T, 0),  # quirk: x are rows, so a picture is read mirrored at its diagonal
        ("in front of", seen("dog", 20, 0), depth_of(1, 0), 1),  # IoU 2 / 3
        ("in front of", seen("dog", 0, 0, 200, 100), depth_of(1, 0), 0),  # quirk: an IoU of exactly a half
        ("in front of", seen("dog", 0, 0, 201, 100), depth_of(1, 0), 2 * 100 / 201),
        ("in front of", DOG, depth_of(1, 0), 0),  # no overlap
        ("in front of", OVER, depth_of(1, 1), 0),  # no difference
        ("near", OVER, depth_of(1, 0), 0),
        (None, OVER, depth_of(1, 0), 0),
        ("in front of", seen("dog", 50, 0, 0.2, 0.2), depth_of(1, 0), 0),  # less than a pixel has no depth
    ],
)
def test_placed_in_depth(relation, b, depth, score):
    assert placed_in_depth(relation, CAT, b, depth) == pytest.approx(score)


@pytest.mark.parametrize(
    ("detections", "score"),
    [
        ([CAT, OVER], 0.5 + 1 / 3),
        ([seen("wildcat", 0, 0), OVER], 0.5 + 1 / 3),  # quirk: names within names
        ([CAT], 0.25),  # and nothing is cut off
        ([seen("dog", 0, 0, score=0.4)], 0.1),
        ([], 0),
        # quirk: until a dog is found, later cats replace earlier ones
        ([seen("cat", 300, 0, score=0.9), seen("cat", 0, 0, score=0.8), seen("dog", 50, 0, score=0.7)], 0.375 + 1 / 3),
        ([seen("cat", 0, 0, score=0.9), seen("dog", 50, 0, score=0.8), seen("cat", 300, 0, score=0.7)], 0.425 + 1 / 3),
        # but of one thing alone the first
        ([seen("cat", 0, 0, score=0.8), seen("cat", 300, 0, score=0.4)], 0.2),
    ],
)
def test_spatial_3d(detections, score):
    assert spatial_3d("in front of", ("cat", "dog"), detections, depth_of(1, 0)) == pytest.approx(score)


def test_spatial_3d_without_ends():
    assert spatial_3d("behind", None, [CAT, OVER], depth_of(1, 0)) == 0
    assert relation_of("a vase hidden by a candle", RELATIONS_3D) == "hidden"


# counts


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("two boys", [("boy", 2)]),
        ("one fish and two fish", [("fish", 1), ("fish", 2)]),
        ("four apples were picked from the tree", [("apple", 4)]),
        ("a backpack, three apples, and a bowl", [("backpack", 1), ("apple", 3), ("bowl", 1)]),
        ("eight mice and nine men", [("mouse", 8)]),  # quirk: up to eight
        ("two big dogs", []),  # quirk: right after the number
        ("two walruses", []),
        ("two dog", []),
        ("a lively tune", []),
        ("two", []),
        ("", []),
    ],
)
def test_counted(prompt, asked):
    assert counted(built_in(prompt).words) == asked


def apart(*labels: str) -> list[Detection]:
    return [seen(label, 200 * i, 0, score=0.9 - 0.01 * i) for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("asked", "detections", "score"),
    [
        ([("dog", 2)], apart("dog", "dog"), 1),
        ([("dog", 2)], apart("dog"), 0.5),
        ([("dog", 2)], apart("dog", "dog", "dog"), 0.5),
        ([("dog", 2)], apart("cat"), 0),
        ([("dog", 2)], [], 0),
        ([], apart("dog"), 0),
        ([("dog", 1), ("cat", 1)], apart("dog"), 0.5),
        ([("dog", 1), ("cat", 2)], apart("dog", "cat"), 0.75),
        ([("girl", 1), ("boy", 1)], apart("person"), 1),  # quirk: one person is both
        ([("ship", 1), ("painting", 1), ("goldfish", 1)], apart("boat", "picture", "fish"), 1),
        ([("bear", 1)], apart("teddy bear"), 1),  # quirk: names within names
        ([("bear", 1)], apart("teddy bear", "bear"), 1),  # but only where the name itself is missing
        ([("bear", 1), ("teddy bear", 1)], apart("teddy bear"), 0.5),  # and it is then gone
        ([("television", 1)], apart("tv"), 0),  # quirk
        ([("dog", 1)], [seen("dog", 0, 0), seen("dog", 1, 0)], 1),  # one dog twice: IoU above 0.9
        ([("dog", 1)], [seen("dog", 0, 0), seen("dog", 30, 30, 20, 20)], 1),  # one within the other
        ([("dog", 2)], [seen("dog", 0, 0), seen("dog", 11, 0)], 1),  # each holds 0.89 of the other
        ([("dog", 1), ("cat", 1)], [seen("dog", 0, 0), seen("cat", 0, 0)], 1),  # of different names
    ],
)
def test_numeracy(asked, detections, score):
    assert numeracy(asked, detections) == pytest.approx(score)


# the rest


@pytest.mark.parametrize(
    ("listed", "score"), [("spatial", 0.35), ("action", 0.4), (None, (0.6 + 0.1 + 0.2) / 3), ("other", 0.3)]
)
def test_three_in_one(listed, score):
    assert three_in_one(attribute=0.6, spatial=0.1, action=0.2, list_of=listed) == pytest.approx(score)


def test_without_adjectives():
    assert without_adjectives(built_in("The red hat, on a brown rack.")) == "The hat , on a rack ."


@pytest.mark.parametrize(
    ("size", "shown"),
    [((1024, 1024), (479, 479)), ((512, 1024), (240, 480)), ((479, 480), (479, 480)), ((100, 100), (479, 479))],
)
def test_the_frame(size, shown):
    scale = frame_scale(*size)
    assert (size[0] * scale, size[1] * scale) == pytest.approx(shown)


boxes = st.tuples(*[st.floats(0, 500)] * 4).map(lambda b: Detection("cat", (b[0], b[1], b[0] + b[2], b[1] + b[3]), 1.0))


@given(boxes, boxes)
def test_iou(a, b):
    assert 0 <= iou(a, b) <= 1 + 1e-12
    assert iou(a, b) == pytest.approx(iou(b, a), abs=1e-12)
    area = (a.box[2] - a.box[0]) * (a.box[3] - a.box[1])
    assert iou(a, a) == (pytest.approx(1) if area > 0 else 0)


names = st.sampled_from(["cat", "dog", "wildcat"])
found = st.lists(st.builds(lambda d, n, s: Detection(n, d.box, s), boxes, names, st.floats(0, 1)), max_size=5)
relations = st.sampled_from(["on the left of", "on the top of", "near", "in front of", "behind", None])


@given(found, relations, st.integers(0, 5))
def test_scores_lie_in_range(detections, relation, count):
    depth = np.linspace(0, 1, 480 * 480).reshape(480, 480)
    for score in (
        spatial(relation, ("cat", "dog"), detections),
        spatial_3d(relation, ("cat", "dog"), detections, depth),
        numeracy([("cat", count), ("dog", 1)], detections),
    ):
        assert 0 <= score <= 1 + 1e-12
