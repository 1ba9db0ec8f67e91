import pytest
from blocktune.evaluators.template import CLASSES, COLORS, NUMBERS, RELATIONS, metadata_of, plural, with_article
from hypothesis import given
from hypothesis import strategies as st

BENCH, CUP, HOT_DOG, SCISSORS = ({"class": name, "count": 1} for name in ("bench", "cup", "hot dog", "scissors"))


@pytest.mark.parametrize(
    ("text", "tag", "include", "exclude"),
    [
        ("a photo of a bench", "single_object", [BENCH], None),
        ("a photo of a bench and a cup", "two_object", [BENCH, CUP], None),
        ("a photo of four benchs", "counting", [BENCH | {"count": 4}], [BENCH | {"count": 5}]),
        ("a photo of four benches", "counting", [BENCH | {"count": 4}], [BENCH | {"count": 5}]),
        ("a photo of a red bench", "colors", [BENCH | {"color": "red"}], None),
        ("a photo of a bench left of a cup", "position", [CUP, BENCH | {"position": ["left of", 0]}], None),
        (
            "a photo of a red bench and a blue cup",
            "color_attr",
            [BENCH | {"color": "red"}, CUP | {"color": "blue"}],
            None,
        ),
        ("a picture of an orange", "single_object", [{"class": "orange", "count": 1}], None),
        ("a photo of an orange orange", "colors", [{"class": "orange", "count": 1, "color": "orange"}], None),
        (
            "a photo of two hot dogs.",
            "counting",
            [{"class": "hot dog", "count": 2}],
            [{"class": "hot dog", "count": 3}],
        ),
        (
            "a photo of two scissorses",
            "counting",
            [{"class": "scissors", "count": 2}],
            [{"class": "scissors", "count": 3}],
        ),
    ],
)
def test_reads(text, tag, include, exclude):
    wanted = {"tag": tag, "include": include, "prompt": text} | ({"exclude": exclude} if exclude else {})
    assert metadata_of(text) == wanted


things = st.sampled_from((*CLASSES, "cross", "torch", "fox", "brush", "ring", "house"))  # some that COCO lacks


@given(things, st.sampled_from(list(NUMBERS)[1:]), st.sampled_from(COLORS))
def test_reads_what_it_writes(thing, number, color):
    (counted,) = metadata_of(f"a photo of {number} {plural(thing)}")["include"]
    assert counted == {"class": thing, "count": NUMBERS[number]}
    (plain,) = metadata_of(f"a photo of {with_article(thing)}")["include"]
    assert plain == {"class": thing, "count": 1}
    (colored,) = metadata_of(f"a photo of {with_article(f'{color} {thing}')}")["include"]
    assert colored == {"class": thing, "count": 1, "color": color}


@given(things, things, st.sampled_from(RELATIONS))
def test_reads_places(thing, target, relation):
    include = metadata_of(f"a photo of {with_article(thing)} {relation} {with_article(target)}")["include"]
    assert include == [{"class": target, "count": 1}, {"class": thing, "count": 1, "position": [relation, 0]}]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a photo of",
        "a photo of bench",
        "a bench",
        "a photo of a bench and cup",
        "a photo of a bench and a cup and a dog",
        "a photo of the bench",
        "A PHOTO OF A BENCH",
        "a photo of a",
    ],
)
def test_refuses_other_sentences(text):
    with pytest.raises(ValueError, match=r"prompt is .*; accepted: 'a photo of '"):
        metadata_of(text)
