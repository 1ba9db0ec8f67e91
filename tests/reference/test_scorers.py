"""The learned scores on scenes that no training has seen. Conformance is tested with all other evaluators'."""

import json

import numpy as np
import pytest
from blocktune.evaluators import cmmd, get
from blocktune.evaluators.clip import load_clip
from blocktune.reference.scenes import prompt_of
from blocktune.reference.scorer_card import CARD, degraded, drawn, falls, held_out, of_renderings, preferred, retrieval
from blocktune.reference.scorers import PREFERENCE, WEIGHTS

NAMES = ["clip_score:reference", "hps_v2.1:reference", "aesthetic_v2:reference", "geneval-style:reference"]
REQUESTS, SCENES = held_out(64, part=1)
PICTURES, TEXTS = drawn(SCENES), [prompt_of(request).replace("cyan", "blue") for request in REQUESTS]


def test_a_picture_finds_its_sentence_and_a_sentence_its_picture():
    found = retrieval(groups=16)
    assert found["text of picture"] >= 0.95
    assert found["picture of text"] >= 0.95


def test_the_score_falls_when_the_sentence_is_changed():
    found = falls("clip_score:reference", 256)
    for part in ("shape", "color", "swap", "count", "relation"):
        assert found[part] >= 0.95


def test_true_pictures_are_preferred_to_degraded_and_to_wrong_ones():
    found = preferred("hps_v2.1:reference", 192)
    assert found["above degraded"] >= 0.9
    assert found["above wrong"] >= 0.9


def test_degraded_pictures_are_rated_lower():
    found = preferred("aesthetic_v2:reference", 192)
    assert found["above degraded"] >= 0.9


def test_degraded_pictures_are_another_distribution():
    embed = load_clip(PREFERENCE).images
    others = drawn(held_out(64, part=2)[1])
    assert cmmd(degraded(PICTURES), others, embed) > 2 * cmmd(PICTURES, others, embed)


def test_geneval_agrees_with_the_exact_judge():
    found = of_renderings(192)
    assert 0.3 < found["right by the judge"] < 0.7
    assert found["agree"] >= 0.95


@pytest.mark.parametrize("name", NAMES[1:])
def test_noise_lies_below_the_worst_healthy_picture(name):
    """Not so of the first, as `docs/evaluators.md` says."""
    noise = np.random.default_rng(0).integers(0, 256, PICTURES.shape, dtype=np.uint8)
    assert get(name).score(noise, TEXTS).max() < get(name).score(PICTURES, TEXTS).min()


@pytest.mark.parametrize("name", NAMES[:3])
def test_empty_and_endless_sentences_have_a_score(name):
    texts = ["", " ", "a red circle " * 60, "a photo of a red circle"]
    scores = get(name).score(PICTURES[:4], texts)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_same_wherever_the_weights_lie(name):
    evaluator = get(name)
    assert evaluator.name == name
    assert str(WEIGHTS) not in name


def test_the_card_tells_what_is_shipped():
    """Measured on more scenes than the tests can afford."""
    card = json.loads(CARD.read_text())
    for way in ("text of picture", "picture of text"):
        assert card["clip_score"]["retrieval of 64"][way] >= 0.95
    assert card["hps_v2.1"]["preferred"]["above degraded"] >= 0.9
    assert card["geneval-style"]["renderings"]["agree"] >= 0.98
    assert card["geneval-style"]["generated"]["agree"] >= 0.95
    assert sum(file.stat().st_size for file in (WEIGHTS / "clip").iterdir()) < 4 * 2**20
    assert sum(file.stat().st_size for file in (WEIGHTS / "detector").iterdir()) < 3 * 2**20
