"""One real search that races, begins with a probe's candidates, keeps constraints, ends at a limit, and goes on."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import yaml
from blocktune.dashboards.answers import answer
from blocktune.dashboards.files import RunFiles
from blocktune.search.front import slug
from blocktune.search.storage import point_of, stands

from .conftest import trials_of
from .test_prior import ORIGINS, probe_table

ANCHORS = 6


@pytest.fixture(scope="module")
def world(new_world: Callable[..., Any]) -> Any:
    world = new_world(trials=16)
    config = yaml.safe_load(world.config.read_text())
    config["prompts"] |= {"search": str(world.folder / "confirm.jsonl"), "search_images": 6}
    config["search"] |= {
        "first_images": 2, "max_images": 6 * ANCHORS + 8, "prior": probe_table(world.folder / "probe.parquet")
    }  # fmt: skip
    config["confirm"] |= {
        "margin": 9, "quality_margin": 9, "repeats": 3,  # so that something is picked, though the machine falters once
        "best_of": "shapes",
        "neighbours": 2, "transfer": [{"num_inference_steps": 3}, {"guidance_scale": 1.0, "height": 32, "width": 48}],
    }  # fmt: skip
    config["constraints"] = {"max_latency": 0.98, "min_fidelity": {"psnr": 15.0}}
    world.config.write_text(yaml.safe_dump(config))
    world.pause = 0
    return world


@pytest.fixture(scope="module")
def run_directory(world: Any) -> Path:
    return world.folder / "run"


@pytest.fixture(scope="module")
def stopped(world: Any, run_directory: Path) -> list[optuna.trial.FrozenTrial]:
    little = ["--set", "confirm.neighbours=0", "--set", "confirm.transfer=[]"]  # it is confirmed again at the end
    done = world.run("search", world.config, "--out", run_directory, *little)
    assert "the search ends at search.max_images: " in done.stderr
    return trials_of(run_directory)


@pytest.fixture(scope="module")
def ended(world: Any, run_directory: Path, stopped: list[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    done = world.run("search", world.config, "--out", run_directory, "--resume", "--set", "search.max_images=null")
    assert "the search ends at search.trials: 16 are done" in done.stderr
    return trials_of(run_directory)


def test_a_limit_of_pictures_ends_a_search_that_more_of_them_resume(
    world: Any, run_directory: Path, stopped: list[optuna.trial.FrozenTrial], ended: list[optuna.trial.FrozenTrial]
) -> None:
    done = [t for t in stopped if t.state.name == "COMPLETE"]  # what is to be tried next waits
    assert ANCHORS < len(done) < 16
    drawn = sum(t.user_attrs["metrics"]["images"] for t in done)
    assert 6 * ANCHORS + 8 <= drawn < 6 * ANCHORS + 8 + 6  # what ran was brought to its end
    assert [t.values for t in ended[: len(done)]] == [t.values for t in done]
    assert [t.state.name for t in ended] == ["COMPLETE"] * 16


def test_the_reason_of_the_end_is_told(run_directory: Path, ended: list[optuna.trial.FrozenTrial]) -> None:
    assert "* ended by: search.trials: 16 are done" in (run_directory / "report.md").read_text()
    with sqlite3.connect(run_directory / "mlflow.db") as database:
        (told,) = database.execute("select value from tags where key = 'ended'").fetchall()
    assert told == ("search.trials: 16 are done",)


def test_what_a_probe_suggests_comes_behind_the_anchors(ended: list[optuna.trial.FrozenTrial]) -> None:
    origins = [t.user_attrs.get("origin") for t in ended]
    assert origins[: ANCHORS + len(ORIGINS)] == [None] * ANCHORS + list(ORIGINS)
    together = [origin for origin in origins[ANCHORS + len(ORIGINS) :] if origin]
    assert {", " in origin for origin in together} == {True}  # anchors taken together
    whole = [t.user_attrs["metrics"]["images"] for t in ended if "origin" in t.user_attrs]
    assert set(whole) <= {0.0, 6.0}  # no race ends them; what is known under another name costs nothing
    assert ended[ANCHORS].params["operand"] == "value"


def test_known_points_are_called_by_where_they_are_from(
    run_directory: Path, ended: list[optuna.trial.FrozenTrial]
) -> None:
    known = [t for t in ended if "origin" in t.user_attrs]
    assert [point_of(t).name for t in known] == [t.user_attrs["origin"] for t in known]
    shown = answer(RunFiles(run_directory), "api/run")["trials"]
    for t in known:
        assert shown["name"][t.number] == t.user_attrs["origin"]
        for address in (shown["slug"][t.number], f"trial-{t.number}"):
            assert answer(RunFiles(run_directory), f"api/candidates/{address}")["name"] == t.user_attrs["origin"]
    assert slug("FLUX [2,7,12,17,22] x1.5") == "FLUX-2-7-12-17-22-x1.5"


def test_what_picks_are_beyond_themselves_is_told(
    world: Any, run_directory: Path, ended: list[optuna.trial.FrozenTrial]
) -> None:
    picked = [c for c in json.loads((run_directory / "confirmed.json").read_text())["confirmed"] if c["picks"]]
    assert picked
    report = (run_directory / "report.md").read_text()
    for c in picked:
        assert c["neighbours"]["count"] == 2
        assert [told["setting"] for told in c["transfer"]] == yaml.safe_load(world.config.read_text())["confirm"][
            "transfer"
        ]
        assert f"at guidance_scale 1.0, height 32, width 48: alignment {c['transfer'][1]['alignment']}, " in report
    before = {p.stem: pd.read_parquet(p) for p in (run_directory / "scores").glob("*.parquet")}
    numbers = {t.user_attrs["key"]: t.user_attrs.get("same_as", t.number) for t in reversed(ended)}
    falls = {
        c["key"]: min(
            (before[name]["lamp:Brightness"] - before[f"trial-{numbers[c['key']]:04d}"]["lamp:Brightness"]).mean()
            for name in before if name.startswith("neighbour-")
        )
        for c in picked
    }  # fmt: skip
    assert min(c["neighbours"]["alignment"] for c in picked) >= min(falls.values()) - 1e-9


def test_constraints_decide_what_stands(run_directory: Path, ended: list[optuna.trial.FrozenTrial]) -> None:
    unmodified = ended[0].user_attrs["metrics"]["latency"]
    for trial in ended:
        metrics, broken = trial.user_attrs["metrics"], trial.constraints
        assert broken["max_latency"] == pytest.approx(metrics["latency"] / unmodified - 0.98)
        assert broken["min_fidelity psnr"] == pytest.approx(15 - metrics["psnr"])
        keeps = metrics["latency"] <= 0.98 * unmodified and metrics["psnr"] >= 15 and broken["insane_pictures"] <= 0
        assert stands(trial) == (keeps and "dropped" not in trial.user_attrs)
        if broken["max_latency"] > 0 and not {"anchor", "origin", "same_as"} & trial.user_attrs.keys():
            assert trial.user_attrs["metrics"]["images"] == 2  # known before a picture is drawn
    assert {stands(t) for t in ended} == {True, False}


@pytest.mark.usefixtures("in_place")
def test_the_dropped_are_told_by_an_estimate_and_stand_nowhere(
    run_directory: Path, ended: list[optuna.trial.FrozenTrial], printed: Callable[..., str]
) -> None:
    before = pd.read_parquet(run_directory / "scores" / "unmodified.parquet")
    measured = [t for t in ended if "same_as" not in t.user_attrs]
    dropped = [t for t in measured if "dropped" in t.user_attrs]
    assert dropped
    for trial in measured:
        scores = pd.read_parquet(run_directory / "scores" / f"trial-{trial.number:04d}.parquet")
        seen = int(trial.user_attrs["metrics"]["images"])
        assert len(scores) == seen
        assert (seen in (2, 3, 5)) == ("dropped" in trial.user_attrs)  # two, and half as many again each time
        assert seen == 6 or "anchor" not in trial.user_attrs
        for value, name in zip(trial.values, ("lamp:Brightness", "crispness"), strict=False):
            assert value == pytest.approx(before[name].mean() + (scores[name] - before[name][:seen]).mean(), abs=1e-12)
    names = {point_of(t).name for t in ended if "dropped" in t.user_attrs}
    confirmed = {c["name"] for c in json.loads((run_directory / "confirmed.json").read_text())["confirmed"]}
    front = {row["name"] for row in json.loads(printed("front", run_directory, "--format", "json"))}
    assert not names & (confirmed | front)
