"""Every example goes its whole road on a tiny random pipeline of its class: search, confirm, export, a picture."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from blocktune.evaluators import Prompt
from blocktune.policies import BlockPolicy
from blocktune.search.config import Generation, load_config
from blocktune.search.estimate import estimate
from blocktune.search.generation import embed, generate, load
from blocktune.search.run_directory import RunDirectory
from blocktune.search.study import check_objectives
from PIL import Image

from ..policies.pipelines import flux_pipeline, qwen_image_pipeline, sd3_pipeline, with_t5
from ..search.conftest import HANG

FOLDER = Path(__file__).parents[2] / "examples"
PIPELINES = {
    "flux.1-dev": flux_pipeline,
    "qwen-image": qwen_image_pipeline,
    "sd3.5-large": lambda: with_t5(sd3_pipeline(num_layers=3, qk_norm="rms_norm")),
    "sd3.5-medium": lambda: with_t5(sd3_pipeline(num_layers=3, qk_norm="rms_norm", dual_attention_layers=(0, 1))),
}
TRIALS = 6
TINY = {
    "model.dtype": "float32", "generation.num_inference_steps": 4, "generation.height": 16, "generation.width": 16,
    "generation.max_sequence_length": 16, "prompts.search_images": 2, "prompts.confirm_images": 2,
    "objectives.alignment": "ssim", "objectives.quality": "crispness", "objectives.reported": "[psnr]",
    "space.anchor_steps": "[3]", "search.trials": TRIALS, "confirm.candidates": 1, "confirm.repeats": 1,
    "ray.workers": 1, "ray.cpus_per_worker": 1,
}  # fmt: skip
# All in one process: torch, diffusers and Ray are imported once. Not in pytest's, where Ray leaves handles behind.
COMMANDS = """
import json, sys
from blocktune.search.cli import main

for command in json.loads(sys.argv[1]):
    sys.argv = ["blocktune", *command]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def test_every_example_is_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(PIPELINES)


@pytest.mark.parametrize("name", PIPELINES)
def test_an_example_names_what_there_is(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml", [])
    assert config.name == name
    check_objectives(config)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_page_counts_as_the_estimate_does(name: str, tmp_path: Path) -> None:
    told = estimate(load_config(FOLDER / f"{name}.yaml", []), RunDirectory(tmp_path))
    (row,) = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith(f"| [`{name}.yaml`]")]
    assert row.split("|")[2].strip() == f"{sum(told.pictures.values()):,}"


@pytest.fixture(scope="module")
def roads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Per example a folder with `pipeline`, `run`, `policy.json` and `out.png`."""
    folders, commands = {}, []
    for name, build in PIPELINES.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        model, run, policy = folder / "pipeline", folder / "run", folder / "policy.json"
        build().save_pretrained(str(model))
        settings = [f"{key}={value}" for key, value in (TINY | {"model.path": model}).items()]
        overrides = [word for setting in settings for word in ("--set", setting)]
        commands += [
            ["search", FOLDER / f"{name}.yaml", "--out", run, *overrides],
            ["export", run, "--pick", "late-reuse-3", "-o", policy],
            ["generate", "--policy", policy, "--model", model, "--prompt", "a red cat", "-o", folder / "out.png"],
        ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands, default=str)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_DISABLE_IMPORT_WARNING": "1"},
        cwd=tmp_path_factory.mktemp("cwd"), capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folders


@pytest.mark.parametrize("name", PIPELINES)
def test_it_searches_and_confirms(name: str, roads: dict[str, Path]) -> None:
    run = roads[name] / "run"
    trials = optuna.load_study(study_name="blocktune", storage=f"sqlite:///{run / 'study.db'}").get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * TRIALS
    confirmed: list[dict[str, Any]] = json.loads((run / "confirmed.json").read_text())["confirmed"]
    names = {one["name"] for one in confirmed}
    assert {"3 steps", "late reuse 3", "all text up"} <= names
    # of four steps the last two reuse, whether after three or after four: measured once, and confirmed once
    anchor = {trial.user_attrs.get("anchor"): trial for trial in trials}
    assert anchor["late reuse 4"].user_attrs["same_as"] == anchor["late reuse 3"].number
    assert "late reuse 4" not in names


@pytest.mark.parametrize("name", PIPELINES)
def test_the_exported_policy_draws_another_picture(name: str, roads: dict[str, Path]) -> None:
    """`out.png` is what the pipeline draws when it obeys the policy, and not what it draws without."""
    folder = roads[name]
    policy = BlockPolicy.load(folder / "policy.json")
    assert policy.evidence is not None
    assert policy.evidence["study"] == name
    assert policy.tuned_for is not None
    generation = Generation(
        **{key: policy.tuned_for[key] for key in Generation.model_fields if key in policy.tuned_for}
    )
    pipe = load(str(folder / "pipeline"), "cpu", torch.float32)
    prompts, rows = [Prompt("a red cat", "", 0)], embed(pipe, ["a red cat"], generation)
    obeying, plain = (generate(pipe, prompts, rows, generation, p)[0].astype(int) for p in (policy, None))
    with Image.open(folder / "out.png") as picture:
        drawn = np.asarray(picture).astype(int)
    assert np.abs(drawn - obeying).max() <= 1  # other threads round otherwise
    assert (obeying != plain).any()
