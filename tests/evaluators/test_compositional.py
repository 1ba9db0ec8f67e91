"""The splits that ship are balanced, disjoint, and what their generator makes."""

import json
from collections import Counter
from importlib.resources import files

import pytest
from blocktune.evaluators import prompts_digest
from blocktune.evaluators.compositional import (
    FIRST_SEED,
    PER_KIND,
    SHAPES,
    SPLITS,
    TEXTURES,
    make_splits,
    meanings,
    prompts,
)
from blocktune.evaluators.prompts import write_splits
from blocktune.evaluators.template import CLASSES, metadata_of

KINDS = ("colors", "shape", "texture", "counting", "position", "attribution")


def test_the_generator_rewrites_every_byte(tmp_path):
    write_splits(tmp_path, make_splits())
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in SPLITS.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (SPLITS / path.name).read_bytes()
    digests = json.loads((SPLITS / "sha256.json").read_text())
    assert digests == {split: prompts_digest(prompts(split)) for split in PER_KIND}


def test_no_text_meaning_or_seed_is_shared():
    meaning = {
        text: (kind, i) for kind, groups in meanings().items() for i, group in enumerate(groups) for text in group
    }
    everything = [prompt for split in PER_KIND for prompt in prompts(split)]
    asked = [(p.kind, meaning[p.text.removeprefix("a picture of ")][1]) for p in everything]
    assert len({p.text for p in everything}) == len(everything) == 6 * sum(PER_KIND.values())
    assert len(set(asked)) == len(everything)
    assert len({p.seed for p in everything}) == len(everything)


@pytest.mark.parametrize("split", PER_KIND)
def test_kinds_come_in_turn(split):
    made = prompts(split)
    assert [p.kind for p in made] == list(KINDS) * PER_KIND[split]
    assert [p.seed for p in made] == list(range(FIRST_SEED[split], FIRST_SEED[split] + len(made)))


@pytest.mark.parametrize("split", PER_KIND)
def test_geneval_can_judge_all_but_shape_and_texture(split):
    tags = {"colors": "colors", "counting": "counting", "position": "position", "attribution": "color_attr"}
    for prompt in prompts(split):
        metadata = metadata_of(prompt.text)
        things = {thing["class"] for thing in metadata["include"]}
        if prompt.kind in tags:
            assert metadata["tag"] == tags[prompt.kind], prompt
            assert things <= {*CLASSES}, prompt
        else:
            words = SHAPES if prompt.kind == "shape" else TEXTURES
            assert all(thing.split(" ")[0] in words for thing in things), prompt
            assert not things & {*CLASSES}, prompt


def test_words_are_spread():
    counts = Counter(word for p in prompts("confirm") if p.kind == "position" for word in p.text.split(" "))
    assert all(counts[word] > 15 for word in ("left", "right", "above", "below"))
    numbers = Counter(p.text.split(" ")[3] for p in prompts("confirm") if p.kind == "counting")
    assert set(numbers) == {"two", "three", "four", "five", "six"}
    assert min(numbers.values()) > 12


def test_ships_with_the_package():
    assert files("blocktune.evaluators").joinpath("splits/search.jsonl").is_file()


def test_refuses_another_split():
    with pytest.raises(ValueError, match="split is 'train'; accepted: search, confirm, test"):
        prompts("train")
