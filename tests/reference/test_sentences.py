import numpy as np
from blocktune.reference.judge import find_objects, judge
from blocktune.reference.prompts import prompts
from blocktune.reference.scenes import prompt_of, read_prompt, render
from blocktune.reference.sentences import altered, sentences, truths
from blocktune.reference.train import sample_pairs

REQUESTS, SCENES = sample_pairs(200, np.random.default_rng(0))
NUMBER = {sentence: i for i, sentence in enumerate(sentences())}


def test_every_prompt_is_a_sentence():
    assert len(NUMBER) == len(sentences())
    assert {p.text for split in ("search", "confirm", "test") for p in prompts(split)} <= NUMBER.keys()


def test_what_is_true_is_what_the_judge_calls_right():
    rng, true = np.random.default_rng(1), truths(SCENES)
    asked = [i for i, sentence in enumerate(sentences()) if sentence == prompt_of(read_prompt(sentence))]
    assert len(asked) == 1902  # all prompts, and no sentence beside them
    for picture, row in zip(render(SCENES[:60]).permute(0, 2, 3, 1).numpy(), true, strict=False):
        found = find_objects(picture)
        likely = [i for i in asked if row[i]] + rng.choice(asked, 60).tolist()
        assert [judge(found, read_prompt(sentences()[i])) for i in likely] == row[likely].tolist()
    assert true[np.arange(200), [NUMBER[prompt_of(request)] for request in REQUESTS]].all()


def test_colours_have_sentences_of_their_own():
    true = truths(SCENES)
    for row, scene in zip(true, SCENES, strict=True):
        said = {sentence for sentence, holds in zip(sentences(), row, strict=True) if holds and "-colored" in sentence}
        assert said == {f"a photo of a {o.color}-colored {o.shape}" for o in scene}
        said = {sentence for sentence, holds in zip(sentences(), row, strict=True) if holds and "object" in sentence}
        assert said == {f"a photo of a {o.color} object" for o in scene}
    assert not true[:, [NUMBER[f"a photo of a {color} circle"] for color in ("pink", "brown", "white")]].any()


def test_one_thing_is_altered():
    rng = np.random.default_rng(2)
    seen = set()
    for request in REQUESTS:
        for part, other in altered(request, rng).items():
            seen.add(part)
            assert other != request
            assert prompt_of(other) in NUMBER
            assert len(other.things) == len(request.things)
            same = {
                "shape": [t.shape for t in other.things] == [t.shape for t in request.things],
                "color": {t.color for t in other.things} == {t.color for t in request.things},
                "count": [t.count for t in other.things] == [t.count for t in request.things],
                "relation": other.relation == request.relation,
            }
            assert [name for name, equal in same.items() if not equal] == ([] if part == "swap" else [part])
    assert seen == {"shape", "color", "swap", "count", "relation"}
