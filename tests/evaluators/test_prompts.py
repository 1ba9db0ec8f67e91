import json
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
from blocktune.evaluators import Prompt, load_prompts, prompts_digest
from hypothesis import given
from hypothesis import strategies as st

PROMPTS = (
    Prompt("a photo of a red circle", "colors", 7),
    Prompt("ein Foto von zwei Kühen, “groß”", "counting", 0),
)
texts = st.text().filter(str.strip)
prompts = st.lists(st.builds(Prompt, texts, st.text(), st.integers(0, 2**63 - 1)), min_size=1).map(tuple)


@given(prompts)
def test_reads_back_what_was_written(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("prompts") / "set.jsonl"
    path.write_text("\n".join(json.dumps(asdict(prompt)) for prompt in written) + "\n\n", encoding="utf-8")
    assert load_prompts(path) == written
    assert load_prompts(str(path)) == written


def test_raw_unicode(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(asdict(PROMPTS[1]), ensure_ascii=False), encoding="utf-8")
    assert load_prompts(path) == PROMPTS[1:]


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        PROMPTS[0].seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_digest():
    digest = prompts_digest(PROMPTS)
    assert digest == prompts_digest(list(PROMPTS)) == "3e411143ff7ee37d69aa619e804374f21e5c00f3b7b02b5d406610e2a6e897b2"
    changed = [
        PROMPTS[::-1],
        PROMPTS[:1],
        PROMPTS[1:],
        *((replace(PROMPTS[0], **{k: v}), PROMPTS[1]) for k, v in {"text": "a", "kind": "single", "seed": 8}.items()),
    ]
    assert len({digest, *map(prompts_digest, changed)}) == 1 + len(changed)


GOOD = '{"text": "a", "kind": "single", "seed": 1}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no prompts"),
        (f"{GOOD}\nnonsense", ":2 is not JSON"),
        (f"{GOOD}\n[1]", ":2 is '\\[1\\]'; accepted: an object with exactly text, kind, seed"),
        ('{"text": "a", "kind": "single"}', ":1 is .*exactly text, kind, seed"),
        ('{"text": "a", "kind": "single", "seed": 1, "more": 2}', "exactly"),
        ('{"text": 3, "kind": "single", "seed": 1}', ":1: text is 3; accepted: str"),
        ('{"text": "a", "kind": "single", "seed": 1.0}', ":1: seed is 1.0; accepted: int"),
        ('{"text": "a", "kind": "single", "seed": true}', ":1: seed is True; accepted: int"),
        ('{"text": "a", "kind": "single", "seed": -1}', ":1: seed is -1"),
        ('{"text": " ", "kind": "single", "seed": 1}', ":1: text is ' '"),
    ],
)
def test_refuses(tmp_path, content, said):
    path = tmp_path / "set.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        load_prompts(path)
