"""The splits are balanced, disjoint, and what their generator makes."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from blocktune.evaluators import prompts_digest
from blocktune.evaluators.prompts import write_splits
from blocktune.reference import prompts
from blocktune.reference.prompts import PER_KIND, SPLITS, make_splits, texts_of
from blocktune.reference.scenes import KINDS, read_prompt


@pytest.mark.parametrize("split", PER_KIND)
def test_every_prefix_of_whole_turns_is_balanced(split: str) -> None:
    made = prompts(split)
    assert Counter(p.kind for p in made) == dict.fromkeys(KINDS, PER_KIND[split])
    assert [p.kind for p in made] == [*KINDS] * PER_KIND[split]
    assert len(set(made)) == len(made)


def test_splits_share_neither_text_nor_seed_nor_two_things_in_another_order() -> None:
    for a, b in combinations(PER_KIND, 2):
        assert not {p.text for p in prompts(a)} & {p.text for p in prompts(b)}
        things = [{frozenset(read_prompt(p.text).things) for p in prompts(s) if p.kind == "two"} for s in (a, b)]
        assert not things[0] & things[1]
    seeds = [p.seed for split in PER_KIND for p in prompts(split)]
    assert len(set(seeds)) == len(seeds)
    for number, split in enumerate(PER_KIND, 1):
        assert all(p.seed // 1_000_000 == number for p in prompts(split))


def test_every_split_has_texts_of_every_kind() -> None:
    assert {split: len(texts) for split, texts in texts_of("single").items()} == {"search": 2, "confirm": 2, "test": 2}
    for kind in KINDS:
        assert all(texts_of(kind).values())


def test_digests_are_in_step() -> None:
    digests = json.loads((SPLITS / "sha256.json").read_text())
    assert digests == {split: prompts_digest(prompts(split)) for split in PER_KIND}


def test_writing_again_gives_the_committed_bytes(tmp_path: Path) -> None:
    write_splits(tmp_path, make_splits())
    names = sorted(path.name for path in SPLITS.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (SPLITS / name).read_bytes(), name


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split is 'train'; accepted: search, confirm, test"):
        prompts("train")
