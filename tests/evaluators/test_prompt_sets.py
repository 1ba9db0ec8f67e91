import json
from collections import Counter
from dataclasses import asdict

import pytest
from blocktune.evaluators import Prompt, read_prompt_set
from blocktune.evaluators.compositional import prompts
from blocktune.evaluators.geneval import GenEval
from blocktune.evaluators.template import CLASSES, COLORS, RELATIONS, metadata_of, plural, with_article

TEXTS = ["a photo of a bench", "a photo of two cups", "a photo of a red bus"]


@pytest.fixture
def geneval(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(json.dumps(metadata_of(text)) for text in TEXTS) + "\n")
    return path


def test_geneval(geneval):
    made = read_prompt_set(geneval, "search")
    assert [(p.text, p.kind) for p in made] == list(zip(TEXTS, ["single_object", "counting", "colors"], strict=True))


def test_a_whole_file_of_geneval(tmp_path):
    things, colors = [with_article(name) for name in CLASSES], [COLORS[(i + i // 80) % 10] for i in range(100)]
    other = [things[(i + 1 + i // 80) % 80] for i in range(100)]
    texts = {
        "single_object": things,
        "two_object": [f"{things[i % 80]} and {other[i]}" for i in range(99)],
        "counting": [f"{('two', 'three', 'four')[i % 3]} {plural(name)}" for i, name in enumerate(CLASSES)],
        "colors": [with_article(f"{colors[i]} {CLASSES[i % 80]}") for i in range(94)],
        "position": [f"{things[i % 80]} {RELATIONS[i % 4]} {other[i]}" for i in range(100)],
        "color_attr": [
            f"a {colors[i]} {CLASSES[i % 80]} and a {COLORS[i % 7]} {CLASSES[(i + 9) % 80]}" for i in range(100)
        ],
    }
    lines = {f"a photo of {text}": kind for kind, some in texts.items() for text in some}
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(metadata_of(text)) + "\n" for text in lines))
    made = read_prompt_set(path, "test")
    assert [(p.text, p.kind) for p in made] == list(lines.items())
    assert list(Counter(p.kind for p in made).values()) == [80, 99, 80, 94, 100, 100]
    judge = GenEval(metadata=path)
    assert len(judge.metadata) == 553
    assert all(judge.metadata[text] == metadata_of(text) for text in lines)


def test_seeds_differ_by_prompt_and_split(geneval):
    seeds = [p.seed for split in ("search", "confirm", "test") for p in read_prompt_set(geneval, split, 200)]
    assert len(set(seeds)) == 600
    assert read_prompt_set(geneval, "test", 200) == read_prompt_set(str(geneval), "test", 200)


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_prompts_come_again_where_more_are_asked_for(geneval, count):
    made = read_prompt_set(geneval, "confirm", count)
    assert [p.text for p in made] == [TEXTS[i % 3] for i in range(count)]


def test_t2i_compbench(tmp_path):
    path = tmp_path / "3d_spatial_val.txt"
    path.write_text("a dog in front of a desk\n\na car behind a mouse\n")
    made = read_prompt_set(path, "search")
    assert [(p.text, p.kind) for p in made] == [
        ("a dog in front of a desk", "3d_spatial"),
        ("a car behind a mouse", "3d_spatial"),
    ]


def test_parti(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(
        'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t-\na sign that says "Hi"\tWorld\tText\t-\n'
    )
    made = read_prompt_set(path, "search")
    assert [(p.text, p.kind) for p in made] == [("bond", "Abstract"), ('a sign that says "Hi"', "World")]


def test_own_format_keeps_its_seeds(tmp_path):
    path = tmp_path / "mine.jsonl"
    mine = (Prompt("a bench", "single", 7), Prompt("a cup", "single", 9))
    path.write_text("".join(json.dumps(asdict(prompt)) + "\n" for prompt in mine))
    assert read_prompt_set(path, "search") == mine
    assert read_prompt_set(path, "search", 1) == mine[:1]


def test_compositional():
    assert read_prompt_set("compositional", "confirm") == prompts("confirm")
    assert read_prompt_set("compositional", "confirm", 12) == prompts("confirm")[:12]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("set.csv", "a", r"prompts are '.*set\.csv'; accepted: compositional, or a file in \.txt, \.tsv, \.jsonl"),
        ("set.txt", "\n \n", r"set\.txt holds no prompts"),
        ("set.tsv", "Prompt\tKind\nbond\tAbstract\n", r"columns \['Prompt', 'Kind'\]; accepted: Prompt and Category"),
        ("set.tsv", "Prompt\tCategory\nbond\n", r"set\.tsv:2 has Prompt 'bond' and Category None"),
        ("set.tsv", "Prompt\tCategory\n", r"set\.tsv holds no prompts"),
        ("set.jsonl", "", "holds no prompts"),
        ("set.jsonl", "no json", ":1 is not JSON"),
        ("set.jsonl", '{"tag": "colors"}', ":1 is .*; accepted: an object with tag, include and prompt"),
    ],
)
def test_refuses(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        read_prompt_set(path, "search")


def test_refuses_another_split_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="split is 'train'; accepted: search, confirm, test"):
        read_prompt_set("compositional", "train")
    for suffix in (".jsonl", ".txt", ".tsv"):
        with pytest.raises(OSError, match="No such file"):
            read_prompt_set(tmp_path / f"none{suffix}", "search")
