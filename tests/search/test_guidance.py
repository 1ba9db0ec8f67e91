"""One real search with a choice of guidance, from its anchors to the pictures that its policies draw."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from blocktune.dashboards.answers import answer
from blocktune.dashboards.files import RunFiles
from blocktune.policies import BlockPolicy
from PIL import Image

OWN, OTHER = 6.0, 2.5
TRIALS = 16
# Another scale of guidance changes the untrained model's pictures more than anything else in the space does, so that,
# whatever reuse costs on this machine, the fastest at OTHER is on the front.
EVALUATOR = """
class Change:
    name, direction, needs_reference = "change", "maximize", True

    def score(self, images, prompts, reference=None):
        pairs = np.asarray(images, dtype=float) - np.asarray(reference)
        return np.abs(pairs).reshape(len(pairs), -1).mean(1) / 255
"""


@pytest.fixture(scope="module")
def world(new_world: Callable[..., Any]) -> Any:
    """Of few choices, so that what reuses at OTHER comes up, and all of the front confirmed."""
    world = new_world(trials=TRIALS)
    with (world.folder / "lamp.py").open("a") as file:
        file.write(EVALUATOR)
    config = yaml.safe_load(world.config.read_text())
    config["generation"] |= {"guidance_scale": OWN}
    config["objectives"] |= {"alignment": "lamp:Change", "reported": ["lamp:Brightness", "psnr"]}
    config["space"] |= {
        "guidance_scale": [OTHER], "bands": 1, "reuse_every": [2, 3], "skip": False, "operands": ["value"],
        "steps": [], "anchor_steps": [],
    }  # fmt: skip
    config["search"] |= {"racing": False}
    config["confirm"] |= {
        "candidates": TRIALS, "margin": 9, "quality_margin": 9, "neighbours": 2, "transfer": [{"guidance_scale": OWN}]
    }  # fmt: skip
    world.config.write_text(yaml.safe_dump(config))
    world.pause = 0
    return world


@pytest.fixture(scope="module")
def searched(world: Any) -> Path:
    world.run("search", world.config, "--out", world.folder / "run")
    return world.folder / "run"


@pytest.fixture(scope="module")
def trials(searched: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="blocktune", storage=f"sqlite:///{searched / 'study.db'}").get_trials()


@pytest.fixture(scope="module")
def confirmed(searched: Path) -> list[dict[str, Any]]:
    return json.loads((searched / "confirmed.json").read_text())["confirmed"]


@pytest.fixture(scope="module")
def member(confirmed: list[dict[str, Any]]) -> dict[str, Any]:
    """A confirmed policy at OTHER."""
    return next(c for c in confirmed if c["rules"] and "guidance_scale" in c)


@pytest.fixture(scope="module")
def policy(searched: Path, member: dict[str, Any]) -> Path:
    return searched / "policies" / f"{member['name'].replace(' ', '-')}.json"


def test_the_model_at_another_guidance_is_an_anchor(
    searched: Path, trials: list[optuna.trial.FrozenTrial], confirmed: list[dict[str, Any]]
) -> None:
    assert [t.user_attrs.get("anchor") for t in trials[:2]] == ["unmodified", "guidance 2.5"]
    unmodified, anchor = trials[:2]
    assert anchor.user_attrs["key"] == f"{unmodified.user_attrs['key']}-2.5"
    assert anchor.values[2] == unmodified.values[2]  # another scale takes no time
    scores = [pd.read_parquet(searched / "scores" / f"trial-{t.number:04d}.parquet") for t in (unmodified, anchor)]
    assert (scores[0]["psnr"] == 100).all()
    assert (scores[1]["psnr"] < 100).all()
    assert "guidance 2.5" in {c["name"] for c in confirmed}


def test_every_trial_was_drawn_at_its_own(searched: Path, trials: list[optuna.trial.FrozenTrial]) -> None:
    told = [t.params.get("guidance_scale", OWN) for t in trials]
    assert {OWN, OTHER} <= set(told[5:])  # those that the sampler proposed
    assert told == [t.user_attrs.get("guidance_scale", OWN) for t in trials]
    with sqlite3.connect(searched / "mlflow.db") as database:
        logged = database.execute(
            "select n.value, p.value from params p join tags n on n.run_uuid = p.run_uuid and n.key = 'trial'"
            " where p.key = 'guidance_scale'"
        ).fetchall()
    assert {int(number): float(value) for number, value in logged} == {
        t.number: t.params["guidance_scale"] for t in trials if t.params
    }


def test_generate_draws_the_picture_that_was_scored(
    searched: Path, tiny_model: Path, tmp_path: Path, member: dict[str, Any], policy: Path, printed: Callable[..., str]
) -> None:
    def drawn(*more: object) -> np.ndarray:
        ask = ["generate", "--policy", policy, "--prompt", "a photo of a red ring", "--seed", 101, *more]
        printed(*ask, "--model", tiny_model, "-o", tmp_path / "one.png")
        with Image.open(tmp_path / "one.png") as picture:
            return np.asarray(picture).astype(int)

    name = f"confirm-{member['key'][:16]}-{member['steps']}-{OTHER}"
    with np.load(searched / "images" / f"{name}.npz") as stored:
        scored = stored["images"][1]
    assert np.abs(drawn() - scored).max() <= 1
    assert np.abs(drawn("--guidance", OWN) - scored).max() > 1


@pytest.mark.usefixtures("in_place")
def test_the_file_names_both_scales_and_holds_what_it_claims(
    world: Any, tiny_model: Path, policy: Path, printed: Callable[..., str]
) -> None:
    loaded = BlockPolicy.load(policy)
    assert loaded.tuned_for is not None
    assert loaded.evidence is not None
    assert loaded.tuned_for["guidance_scale"] == OTHER
    assert loaded.evidence["unmodified"]["guidance_scale"] == OWN
    ask = [policy, "--model", tiny_model, "--prompts", world.folder / "confirm.jsonl"]
    told = json.loads(printed("verify", *ask, "--tolerance", 0.99, "--evaluators", "lamp:Brightness,psnr", "--json"))
    assert told["guidance_scale"] == OTHER
    for figure in told["figures"][1:]:  # the prompts and seeds that were confirmed, so the very scores
        assert figure["measured"]["delta"] == pytest.approx(figure["claimed"]["delta"], abs=1e-3)
    claim = loaded.evidence["confirmed"]["lamp:Brightness"]
    (line,) = printed("evaluate", *ask, "--evaluators", "lamp:Brightness").splitlines()
    assert float(line.split()[1]) == pytest.approx(claim["value"], abs=1e-3)
    assert float(line.split()[3]) == pytest.approx(claim["baseline"], abs=1e-3)


def test_guidance_is_told_where_it_is_not_the_models_own(
    searched: Path, confirmed: list[dict[str, Any]], member: dict[str, Any], printed: Callable[..., str]
) -> None:
    lines = (searched / "report.md").read_text().splitlines()
    for c in confirmed:
        line = next(one for one in lines if one.startswith(f"| {c['name']} |"))  # of the first table
        assert f"| {c['steps']}{', guidance 2.5' if 'guidance_scale' in c else ''} |" in line
    rows = json.loads(printed("front", searched, "--format", "json"))
    assert {row["guidance_scale"] for row in rows} <= {OWN, OTHER}
    assert printed("front", searched, "--format", "csv").startswith("name,alignment,quality,latency,steps,guid")
    table = printed("front", searched).splitlines()
    assert [line.endswith(", guidance 2.5") for line in table] == [row["guidance_scale"] == OTHER for row in rows]
    shown = answer(RunFiles(searched), f"api/candidates/{member['name'].replace(' ', '-')}")
    assert shown["guidance"] == OTHER
    assert "guidance_scale=2.5" in shown["code"]
    assert answer(RunFiles(searched), "api/candidates/guidance-2.5")["guidance"] == OTHER
    assert answer(RunFiles(searched), "api/candidates/unmodified")["guidance"] is None


def test_picks_are_tried_at_a_setting_that_goes_before_their_own(confirmed: list[dict[str, Any]]) -> None:
    picked = [c for c in confirmed if c["picks"]]
    assert picked
    for c in picked:
        assert c["neighbours"]["count"] == 2
        assert [told["setting"] for told in c["transfer"]] == [{"guidance_scale": OWN}]
