"""The command line: its version, and a person's mistakes, exit code 2 and one line on stderr."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no config file": (["search", "missing.yaml"], "missing.yaml cannot be read"),
    "nothing to resume": (["search", "--resume", "--out", "nowhere"], "holds no run to resume"),
    "bad value": (["search", "--set", "search.trials=-1"], "search.trials is -1"),
    "guidance off": (
        ["search", "--dry-run", "--set", "space.guidance_scale=[1]"],
        "space.guidance_scale has 1; accepted",
    ),
    "unknown evaluator": (["search", "--set", "objectives.quality=beauty"], "evaluator is 'beauty'"),
    "evaluator not found": (["search", "--set", "objectives.quality=no_such:Thing"], "no_such"),
    "no prompts": (["search", "--set", "prompts.search=none.jsonl"], "prompts.search is 'none.jsonl'"),
    "status of nothing": (["status", "nowhere"], "nowhere holds no run"),
    "front of nothing": (["front", "nowhere"], "nowhere holds no run"),
    "confirm of nothing": (["confirm", "nowhere"], "nowhere holds no run"),
    "export of nothing": (["export", "nowhere"], "nowhere holds no run"),
    "empty prompt": (["generate", "--prompt", " "], "--prompt is empty"),
    "picture in no folder": (
        ["generate", "--prompt", "a ring", "-o", "none/g.png"],
        "--output is none/g.png, which cannot be written: No such file or directory.",
    ),
    "picture for a folder": (
        ["generate", "--prompt", "a ring", "-o", "."],
        "--output is .; accepted: a file name with the ending of pictures, as .png or .jpg.",
    ),
    "picture of no kind": (
        ["generate", "--prompt", "a ring", "--model", "none", "-o", "g.txt"],
        "--output is g.txt; accepted: a file name with the ending of pictures",
    ),
    "picture that waits": (
        ["generate", "--prompt", "a ring", "--policy", "none.json", "-o", "g.png"],
        "none.json",
    ),
    "no policy": (["generate", "--prompt", "a ring", "--policy", "none.json"], "none.json"),
    "evaluate nothing": (["evaluate", "none.json"], "none.json"),
    "verify nothing": (["verify", "none.json"], "none.json"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., str]
) -> None:
    arguments, told = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    assert told in mistake(*arguments)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_prompts_that_are_not_json_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., str]
) -> None:
    (tmp_path / "bad.jsonl").write_text("a photo\n")
    monkeypatch.chdir(tmp_path)
    told = mistake("search", "--set", "prompts.confirm=bad.jsonl")
    assert "prompts.confirm: bad.jsonl:1 is not JSON" in told


def test_the_version_is_the_packages(blocktune: Callable[..., tuple[int, str, str]]) -> None:
    assert blocktune("--version") == (0, f"blocktune {version('blocktune')}\n", "")
