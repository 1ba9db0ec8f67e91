"""Code of the README and the docs does what the pages say, on a tiny model in place of the published ones.

Python runs as printed; calls of a pipeline of another class are held against that class, and drawn by the tiny one.
Commands of blocktune are parsed, YAML is read as a config and JSON as what it is: whether these do what they promise is
tested where they live.
"""

import inspect
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
from blocktune.evaluators import load_prompts
from blocktune.policies import BlockPolicy, Reuse, Rule
from blocktune.search.cli import app
from blocktune.search.config import load_config
from blocktune.search.config_page import page as config_page
from diffusers import DiffusionPipeline

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").glob("*.md")])
LANGUAGES = {"python", "sh", "yaml", "json", "text", "latex", ""}


def blocks_of(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in found} <= LANGUAGES
    return [block for kind, block in found if kind == language]


def pages_with(language: str) -> list:
    return [pytest.param(page, id=named(page)) for page in PAGES if blocks_of(page, language)]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Called:
    """The tiny pipeline, which takes the arguments that `kind` takes: a name that it does not know is a TypeError."""

    def __init__(self, kind: type[DiffusionPipeline], tiny: DiffusionPipeline) -> None:
        self.kind, self.tiny = kind, tiny

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tiny, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self.kind.__call__).bind(self, *args, **kwargs).arguments
        images = self.tiny(given["prompt"], num_inference_steps=2, output_type="latent").images
        return SimpleNamespace(**{"frames" if "num_frames" in given else "images": images})


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page, tmp_path, monkeypatch, tiny_sd3_pipeline):
    pipe = tiny_sd3_pipeline()

    def from_pretrained(cls: type[DiffusionPipeline], *args: Any, **kwargs: Any) -> Any:
        return pipe if isinstance(pipe, cls) else Called(cls, pipe)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.chdir(tmp_path)
    BlockPolicy.for_model(pipe, "found", [Rule(blocks=[1], action=Reuse(every=2))]).save("policy.json")
    names = {"pipe": pipe, "sampling": {"num_inference_steps": 4}}  # what a page may take for granted
    for block in blocks_of(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands_exist_with_these_options(page):
    command = typer.main.get_command(app)
    for line in "\n".join(blocks_of(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0].endswith("blocktune"):
            with command.make_context("blocktune", words[1:]) as context:
                chosen = command.get_command(context, words[1])
                assert chosen is not None, line
                chosen.make_context(words[1], words[2:], parent=context).close()


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_configs_are_accepted(page, tmp_path):
    for block in blocks_of(page, "yaml"):
        (tmp_path / "config.yaml").write_text(block)
        load_config(tmp_path / "config.yaml", [])


@pytest.mark.parametrize("page", pages_with("json"))
def test_files_are_accepted(page, tmp_path):
    for block in blocks_of(page, "json"):
        if "schema_version" in json.loads(block):
            BlockPolicy.model_validate(json.loads(block))
        else:
            (tmp_path / "prompts.jsonl").write_text(block)
            assert load_prompts(tmp_path / "prompts.jsonl")


def test_the_config_reference_is_in_step():
    assert (ROOT / "docs" / "config.md").read_text("utf-8") == config_page()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
