from importlib.util import find_spec

import pytest
from blocktune.evaluators.phrases import built_in, parser, phrases_of
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("a red apple and a green kiwi", ["a red apple", "a green kiwi"]),
        ("a stop sign and red white line", ["a stop sign", "red white line"]),
        ("rubber sole shoes and fluffy clouds", ["rubber sole shoes", "fluffy clouds"]),
        ("a blue jay and a red orange", ["a blue jay", "a red orange"]),
        ("a cat on the left of a dog", ["a cat", "the left", "a dog"]),
        ("a vase hidden by a candle", ["a vase", "a candle"]),
        ("a car in front of a mouse", ["a car", "front", "a mouse"]),
        ("The brown dog was lying on the green mat.", ["The brown dog", "the green mat"]),
        ("The sleek black pen wrote on the crisp white notepad.", ["The sleek black pen", "the crisp white notepad"]),
        ("one bread, four fish, and two bags", ["one bread", "four fish", "two bags"]),
        ("a photo of a heart-shaped rug", ["a photo", "a heart-shaped rug"]),
        ("the", []),
        ("", []),
    ],
)
def test_chunks_of_the_benchmarks_grammar(text, chunks):
    """As en_core_web_sm 3.8 has them."""
    assert list(built_in(text).chunks) == chunks


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("a giraffe next to a lamp", ["giraffe", "lamp"]),
        ("a mouse on side of a key", ["mouse", "side", "key"]),
        ("a red orange and a glass bowl", ["orange", "glass", "bowl"]),
        ("The silver watch ticked on the table.", ["watch", "table"]),
    ],
)
def test_nouns(text, nouns):
    assert built_in(text).nouns == nouns


def test_a_colour_at_the_end_is_a_noun():
    assert built_in("a red").nouns == ["red"]
    assert built_in("a red fish").tags == ("DET", "ADJ", "NOUN")


@given(st.text(st.characters(categories=["L", "P", "Zs"]), max_size=60))
def test_any_text_has_phrases(text):
    phrases = built_in(text)
    assert len(phrases.words) == len(phrases.tags)
    joined = " ".join(phrases.words)
    assert all(chunk in joined for chunk in phrases.chunks)


def test_the_parser_at_hand_is_told():
    installed = find_spec("spacy") is not None and find_spec("en_core_web_sm") is not None
    assert parser().startswith("en_core_web_sm" if installed else "built-in")
    assert phrases_of("a red apple and a green kiwi").chunks == ("a red apple", "a green kiwi")
