"""Every Python block of the README and the docs runs as printed, on a tiny model in place of the published ones."""

import re
from pathlib import Path

import pytest
from blocktune.policies import BlockPolicy, Reuse, Rule
from diffusers import DiffusionPipeline

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch, tiny_sd3_pipeline):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    pipe = tiny_sd3_pipeline()
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(lambda cls, *args, **kwargs: pipe))
    monkeypatch.chdir(tmp_path)
    BlockPolicy.for_model(pipe, "found", [Rule(blocks=[1], action=Reuse(every=2))]).save("policy.json")
    names = {"pipe": pipe, "sampling": {"num_inference_steps": 4}}  # what a page may take for granted
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
