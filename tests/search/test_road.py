"""The whole road by the command line: search, then everything that reads what it wrote."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from blocktune.evaluators import Prompt, holm, paired_t_test
from blocktune.policies import BlockPolicy
from blocktune.reference.scorers import PREFERENCE
from blocktune.search.front import slug
from blocktune.search.prompts import reseeded
from blocktune.search.report import write_report
from blocktune.search.run_directory import RunDirectory
from PIL import Image

from .conftest import trials_of

TRIALS = 8


@pytest.fixture(scope="module")
def world(new_world: Callable[..., Any]) -> Any:
    made = new_world(trials=TRIALS)
    told = yaml.safe_load(made.config.read_text())
    told["confirm"]["cmmd"] = PREFERENCE
    made.config.write_text(yaml.safe_dump(told))
    return made


@pytest.fixture(scope="module")
def searched(world: Any) -> Path:
    """The run directory of one search, started in an empty folder with the default place for its output."""
    before = sorted(p for p in world.folder.rglob("*") if "__pycache__" not in str(p))
    done = world.run("search", world.config)
    run = world.cwd / "runs" / "tiny"
    assert "Traceback" not in done.stdout + done.stderr
    assert "confirm can tell lamp:Brightness from " in done.stderr
    assert str(run.relative_to(world.cwd)) in done.stdout
    outside = [
        p for p in world.folder.rglob("*")
        if "__pycache__" not in str(p) and run not in (p, *p.parents) and p not in before
    ]  # fmt: skip
    assert sorted(outside) == [world.cwd / "runs", world.folder / "faults" / "calls"], (
        "written outside the run directory"
    )
    return run


def test_the_run_directory_is_complete(searched: Path) -> None:
    for name in (
        "study.db",
        "mlflow.db",
        "config.yaml",
        "front.png",
        "compare.png",
        "report.md",
        "report.html",
        "cost_table.json",
    ):
        assert (searched / name).stat().st_size > 0, name
    assert not [p for p in searched.rglob("*") if ".new" in p.name]
    assert list((searched / "policies").glob("*.json"))


def test_every_wanted_trial_finished_and_anchors_came_first(searched: Path) -> None:
    trials = trials_of(searched)
    assert [t.state.name for t in trials] == ["COMPLETE"] * TRIALS
    anchors = [t.user_attrs.get("anchor") for t in trials]
    assert anchors[:6] == ["unmodified", "3 steps", "guidance until 0.3", "late reuse 4", "late reuse 6", "all text up"]
    assert anchors[6:] == [None] * (TRIALS - 6)


def test_the_study_keeps_what_counts_as_100_points(searched: Path) -> None:
    study = optuna.load_study(study_name="blocktune", storage=f"sqlite:///{searched / 'study.db'}")
    expected = {"lamp:Brightness": 1.0, "crispness": 1.0, "shapes": 1.0, "psnr": 100.0}
    assert study.user_attrs["description"]["scales"] == expected


def test_scores_per_picture_agree_with_optuna(searched: Path) -> None:
    for trial in trials_of(searched):
        if "same_as" in trial.user_attrs:
            continue
        scores = pd.read_parquet(searched / "scores" / f"trial-{trial.number:04d}.parquet")
        assert list(scores["seed"]) == [0, 1, 2]
        expected = [
            scores["lamp:Brightness"].mean(),
            scores["crispness"].mean(),
            trial.user_attrs["metrics"]["latency"],
        ]
        assert trial.values == pytest.approx(expected, abs=1e-12)
    unmodified = pd.read_parquet(searched / "scores" / "unmodified.parquet")
    first = pd.read_parquet(searched / "scores" / "trial-0000.parquet")
    assert np.array_equal(unmodified["lamp:Brightness"], first["lamp:Brightness"])


def test_mlflow_has_a_parent_and_a_child_per_trial(searched: Path) -> None:
    with sqlite3.connect(searched / "mlflow.db") as database:
        parent = json.loads((searched / "run.json").read_text())["mlflow_run_id"]
        status = database.execute("select status from runs where run_uuid = ?", (parent,)).fetchone()
        children = database.execute(
            "select r.run_uuid, r.status, r.artifact_uri, n.value from runs r"
            " join tags p on p.run_uuid = r.run_uuid and p.key = 'mlflow.parentRunId' and p.value = ?"
            " join tags n on n.run_uuid = r.run_uuid and n.key = 'trial'",
            (parent,),
        ).fetchall()
        metrics = dict(database.execute("select run_uuid, count(*) from metrics group by run_uuid").fetchall())
        parameters = {row[0] for row in database.execute("select key from params where run_uuid = ?", (parent,))}
    assert status == ("FINISHED",)
    assert {"search.trials", "model.path", "objectives.alignment"} <= parameters
    assert sorted(int(number) for *_, number in children) == list(range(TRIALS))
    for run, state, artifacts, _ in children:
        assert state == "FINISHED"
        assert metrics[run] >= 5
        folder = Path(artifacts.removeprefix("file://"))
        assert searched in folder.parents
        BlockPolicy.load(folder / "policy.json")


def test_policies_tell_what_they_are_for_and_what_was_seen(searched: Path) -> None:
    for path in (searched / "policies").glob("*.json"):
        policy = BlockPolicy.load(path)
        assert policy.name == path.stem
        assert policy.tuned_for is not None
        assert policy.tuned_for["num_inference_steps"] in (4, 3)
        assert policy.tuned_for["dtype"] == "float32"
        assert policy.evidence is not None
        assert {"lamp:Brightness", "crispness", "psnr", "speedup"} <= policy.evidence["confirmed"].keys()


def test_differences_are_tested_for_all_candidates_together(searched: Path) -> None:
    confirmed = json.loads((searched / "confirmed.json").read_text())["confirmed"]
    before = pd.read_parquet(searched / "scores" / "confirm-unmodified.parquet")
    plain = []
    for one in confirmed:
        scores = pd.read_parquet(searched / "scores" / f"confirm-{one['key'][:16]}-{one['steps']}.parquet")
        plain.append(paired_t_test(scores["lamp:Brightness"], before["lamp:Brightness"], list(before["prompt"])))
        assert one["cmmd"] == scores.attrs["cmmd"] > 0
        assert one["fid"] is None
        assert one["bootstrap"]["delta"] == pytest.approx(one["alignment"]["delta"])
        assert one["bootstrap"]["low"] <= one["bootstrap"]["delta"] <= one["bootstrap"]["high"]
    assert [one["p_values"]["lamp:Brightness"] for one in confirmed] == pytest.approx(list(holm(plain)))
    report = (searched / "report.md").read_text()
    assert f"Holm-corrected over all {len(confirmed)} candidates" in report
    head = next(line for line in report.splitlines() if "by bootstrap" in line)
    assert head.startswith("| candidate | lamp:Brightness, by bootstrap | p of lamp:Brightness |")
    assert head.endswith(" CMMD |")


def test_the_transformer_alone_is_told_beside_the_whole(searched: Path) -> None:
    for trial in trials_of(searched):
        assert 0 < trial.user_attrs["metrics"]["transformer_latency"] < trial.user_attrs["metrics"]["latency"]
    record = json.loads((searched / "confirmed.json").read_text())
    base = record["baseline"]
    for one in record["confirmed"]:
        assert 0 < one["transformer_seconds"] < one["seconds"]
        assert one["transformer_speedup"] == pytest.approx(base["transformer_seconds"] / one["transformer_seconds"])
        told = f"x ({one['predicted_speedup']:.2f}x) | {one['transformer_speedup']:.2f}x |"
        assert told in (searched / "report.md").read_text()


def test_a_report_tells_what_its_run_measured(searched: Path, tmp_path: Path) -> None:
    """FID where it was asked for; and of runs of before no transformer alone."""
    shutil.copytree(searched, tmp_path / "run")
    run = RunDirectory.existing(tmp_path / "run")
    record = json.loads(run.confirmed.read_text())
    record["confirmed"][0]["fid"] = 12.34
    for one in record["confirmed"]:
        del one["transformer_seconds"], one["transformer_speedup"]
    run.write_json(run.confirmed, record)
    write_report(run, {})
    lines = run.report.read_text().splitlines()
    assert any(line.endswith(" CMMD | FID |") for line in lines)
    assert any(line.endswith(" | 12.3 |") for line in lines)
    assert not any("transformer alone" in line for line in lines)


@pytest.mark.usefixtures("in_place")
def test_a_dry_run_counted_no_less_than_was_drawn(world: Any, searched: Path, printed: Callable[..., str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in searched.rglob("*")}
    told = printed("search", world.config, "--dry-run")
    assert {p: p.stat().st_mtime_ns for p in searched.rglob("*")} == before
    assert "of one " in told, "the hours are known by the run's cost table"
    assert "as differences spread in the median of" in told
    rows = {path.stem: len(pd.read_parquet(path)) for path in (searched / "scores").glob("*.parquet")}
    for stage, prefix in (("baseline", "unmodified"), ("search", "trial-"), ("confirm", "confirm-")):
        counted = int(told.split(f"{stage} ")[1].split(",")[0])
        drawn = sum(count for name, count in rows.items() if name.startswith(prefix))
        assert 0 < drawn <= counted, stage


def test_export_writes_the_same_policy(world: Any, searched: Path, printed: Callable[..., str]) -> None:
    pick = sorted((searched / "policies").glob("*.json"))[0]
    output = world.folder / "exported.json"
    printed("export", searched, "--pick", pick.stem, "-o", output)
    assert BlockPolicy.load(output) == BlockPolicy.load(pick)


def test_status_and_front(searched: Path, printed: Callable[..., str]) -> None:
    assert f"{TRIALS} complete, 0 failed, 0 running, {TRIALS} wanted" in printed("status", searched)
    rows = json.loads(printed("front", searched, "--format", "json"))
    assert [row["latency"] for row in rows] == sorted(row["latency"] for row in rows)
    lines = printed("front", searched, "--format", "csv").splitlines()
    assert lines[0] == "name,alignment,quality,latency,steps"
    assert len(lines) == 1 + len(rows)
    assert len(printed("front", searched).splitlines()) == len(rows)


def test_generate_draws_the_picture_that_was_scored(
    searched: Path, tiny_model: Path, tmp_path: Path, printed: Callable[..., str]
) -> None:
    confirmed = json.loads((searched / "confirmed.json").read_text())["confirmed"]
    member = next(c for c in confirmed if c["rules"])
    policy = searched / "policies" / f"{slug(member['name'])}.json"
    with np.load(searched / "images" / f"confirm-{member['key'][:16]}-{member['steps']}.npz") as stored:
        scored = stored["images"][1]
    ask = ["generate", "--policy", policy, "--prompt", "a photo of a red ring", "--seed", 101, "--model", tiny_model]
    printed(*ask, "-o", tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        drawn = np.asarray(picture)
    assert drawn.shape == scored.shape
    assert np.abs(drawn.astype(int) - scored).max() <= 1
    printed(*ask, "--compare", "-o", tmp_path / "two.png")
    with Image.open(tmp_path / "two.png") as beside:
        assert beside.width > 2 * drawn.shape[1]


@pytest.mark.usefixtures("in_place")
def test_the_best_of_several_is_kept(
    searched: Path, tiny_model: Path, tmp_path: Path, printed: Callable[..., str], mistake: Callable[..., str]
) -> None:
    policy = sorted((searched / "policies").glob("*.json"))[0]
    ask = ["generate", "--policy", policy, "--prompt", "a photo of a red ring", "--model", tiny_model]
    draws = reseeded([Prompt("", "", 7)], 0) + reseeded([Prompt("", "", 7)], 1)
    for name, more in {
        "kept": ["--seed", 7, "--best-of", 2, "--by", "lamp:Brightness"],
        "dark": ["--seed", 7, "--best-of", 2, "--by", "lamp:Darkness"],
        "one": ["--seed", draws[0].seed],
        "two": ["--seed", draws[1].seed],
    }.items():
        printed(*ask, *more, "-o", tmp_path / f"{name}.png")
    pictures = {path.stem: np.asarray(Image.open(path)).astype(int) for path in tmp_path.glob("*.png")}
    darker, brighter = sorted((pictures["one"], pictures["two"]), key=np.mean)
    assert np.abs(darker - brighter).max() > 1
    assert np.abs(pictures["kept"] - brighter).max() <= 1
    assert np.abs(pictures["dark"] - darker).max() <= 1
    for more in (["--best-of", "2"], ["--by", "lamp:Brightness"], ["--best-of", "2", "--by", "psnr"]):
        told = mistake("generate", "--prompt", "a ring", *more)
        assert "accepted: both, the second an evaluator that needs no unmodified picture, or none." in told


@pytest.mark.usefixtures("in_place")
def test_evaluate_scores_a_policy_against_the_unmodified_model(
    world: Any, searched: Path, tiny_model: Path, printed: Callable[..., str]
) -> None:
    policy = sorted((searched / "policies").glob("*.json"))[0]
    done = printed(
        "evaluate", policy, "--model", tiny_model, "--prompts", world.folder / "confirm.jsonl", "--images", 4,
        "--evaluators", "lamp:Brightness,ssim",
    )  # fmt: skip
    assert [line.split()[0] for line in done.splitlines()] == ["brightness", "ssim"]
    assert done.count("n = 4") == 2


@pytest.mark.usefixtures("in_place")
def test_verify_measures_again_what_confirm_filed(
    world: Any, searched: Path, tiny_model: Path, printed: Callable[..., str]
) -> None:
    policy = sorted((searched / "policies").glob("*.json"))[0]
    ask = ["verify", policy, "--model", tiny_model, "--prompts", world.folder / "confirm.jsonl", "--tolerance", 0.99]
    told = json.loads(printed(*ask, "--evaluators", "lamp:Brightness,crispness,shapes,psnr", "--json"))
    assert told["holds"]
    assert [figure["name"] for figure in told["figures"][1:]] == ["lamp:Brightness", "crispness", "shapes", "psnr"]
    for figure in told["figures"][1:]:  # the prompts and seeds that were confirmed, so the very scores
        assert figure["measured"]["delta"] == pytest.approx(figure["claimed"]["delta"], abs=1e-3)
    assert "lamp:Brightness  not checked" in printed(*ask)
    assert (told["unmodified_steps"], told["batch"]) == (4, 6)


def test_schema_and_env(printed: Callable[..., str]) -> None:
    assert json.loads(printed("schema"))["title"] == "BlockPolicy"
    assert "search" in json.loads(printed("schema", "--config"))["properties"]
    assert "optuna" in printed("env")
