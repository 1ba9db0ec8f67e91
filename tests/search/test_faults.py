"""Kills, dying workers, broken evaluators: what is finished stays, and the search goes on or says why."""

import fcntl
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from .conftest import trials_of, until

TRIALS = 9


def finished(run: Path) -> dict[int, Any]:
    """Numbers of the trials that count, with what they ended as."""
    return {
        t.number: (t.state, t.values, t.user_attrs.get("reason"), t.datetime_complete)
        for t in trials_of(run)
        if t.state == TrialState.COMPLETE or "reason" in t.user_attrs
    }


# One search: stopped by Ctrl-C, killed by -9 among faults of workers and evaluators, and brought to its end.


@pytest.fixture(scope="module")
def world(new_world: Callable[..., Any]) -> Any:
    # scoring 1 is the unmodified model; a worker's death is retried, so 4 and 5, 6 are one trial's faults each
    return new_world(trials=TRIALS, faults={3: "die", 5: "die", 6: "die", 7: "raise", 8: "nan"})


@pytest.fixture(scope="module")
def run(world: Any) -> Path:
    return world.folder / "run"


@pytest.fixture(scope="module")
def interrupted(world: Any, run: Path) -> dict[int, Any]:
    driver = world.start("search", world.config, "--out", run)
    log = world.folder / "stderr.txt"
    until(lambda: f"search 1/{TRIALS}" in log.read_text() or driver.poll() is not None, "a trial")
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) == 130, (world.folder / "stderr.txt").read_text()
    told = (world.folder / "stderr.txt").read_text()
    assert "Traceback" not in told
    assert "--resume" in told
    until(lambda: not world.processes(), "Ray's processes end with the driver", 30)
    return finished(run)


@pytest.fixture(scope="module")
def killed(world: Any, run: Path, interrupted: dict[int, Any]) -> list[FrozenTrial]:
    driver = world.start("search", world.config, "--out", run, "--resume")
    calls = world.folder / "faults" / "calls"
    until(lambda: calls.stat().st_size >= 9 or driver.poll() is not None, "nine scorings")
    os.killpg(driver.pid, signal.SIGKILL)
    assert driver.wait(10) == -signal.SIGKILL, (world.folder / "stderr.txt").read_text()
    until(lambda: not world.processes(), "Ray's processes end with the driver", 60)
    return trials_of(run)


@pytest.fixture(scope="module")
def ended(world: Any, run: Path, killed: list[FrozenTrial]) -> list[FrozenTrial]:
    world.run("search", world.config, "--out", run, "--resume")
    return trials_of(run)


def test_ctrl_c_saves_what_finished(interrupted: dict[int, Any], killed: list[FrozenTrial]) -> None:
    assert interrupted
    assert (
        interrupted.items()
        <= {t.number: (t.state, t.values, t.user_attrs.get("reason"), t.datetime_complete) for t in killed}.items()
    )


def test_no_finished_trial_is_lost_or_counted_twice(
    run: Path, killed: list[FrozenTrial], ended: list[FrozenTrial]
) -> None:
    assert any(t.state == TrialState.RUNNING for t in killed)
    for before in killed:
        if before.state in (TrialState.COMPLETE, TrialState.FAIL):
            after = ended[before.number]
            assert (after.state, after.values, after.params) == (before.state, before.values, before.params)
            assert after.datetime_complete == before.datetime_complete
    assert len(finished(run)) == TRIALS
    assert not any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in ended)


def test_what_ran_at_the_kill_is_run_again_once(killed: list[FrozenTrial], ended: list[FrozenTrial]) -> None:
    for zombie in (t for t in killed if t.state == TrialState.RUNNING):
        assert ended[zombie.number].state == TrialState.FAIL
        (again,) = [t for t in ended if t.user_attrs.get("retry_of") == zombie.number]
        assert again.params == zombie.params
        assert again.user_attrs.get("anchor") == zombie.user_attrs.get("anchor")


def test_every_anchor_was_measured(ended: list[FrozenTrial]) -> None:
    counted = [t for t in ended if t.state == TrialState.COMPLETE or "reason" in t.user_attrs]
    names = [t.user_attrs["anchor"] for t in counted if "anchor" in t.user_attrs]
    assert sorted(names) == [
        "3 steps",
        "all text up",
        "guidance until 0.3",
        "late reuse 4",
        "late reuse 6",
        "unmodified",
    ]


def test_faults_are_failed_trials_with_a_reason(ended: list[FrozenTrial]) -> None:
    reasons = [t.user_attrs["reason"] for t in ended if "reason" in t.user_attrs]
    assert len(reasons) == 3, reasons
    assert reasons[0] == "its worker died 2 times"
    assert "the lamp went out" in reasons[1]
    assert reasons[2] == "lamp:Brightness gave scores that are not finite"


def test_a_worker_that_died_once_costs_no_trial(world: Any, ended: list[FrozenTrial]) -> None:
    """The death of scoring 3 is in no reason: its trial was measured by the worker's replacement."""
    assert (world.folder / "faults" / "calls").stat().st_size >= 9
    assert sum(t.state == TrialState.COMPLETE for t in ended) == TRIALS - 3


@pytest.mark.usefixtures("in_place")
def test_status_tells_the_reasons(run: Path, ended: list[FrozenTrial], printed: Callable[..., str]) -> None:
    told = printed("status", run)
    assert f"{TRIALS - 3} complete" in told
    assert "the lamp went out" in told


def test_tables_have_no_half_written_files(run: Path, ended: list[FrozenTrial]) -> None:
    complete = {
        f"trial-{t.number:04d}" for t in ended if t.state == TrialState.COMPLETE and "same_as" not in t.user_attrs
    }
    assert complete <= {p.stem for p in (run / "scores").glob("trial-*.parquet")}
    assert not list(run.rglob("*.new"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("space.bands=2", "space"), ("objectives.quality=shapes", "objectives"), ("model.dtype=bfloat16", "model"),
        ("generation.num_inference_steps=5", "generation"), ("prompts.search_images=2", "prompts"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("in_place")
def test_resume_with_another_search_is_refused(
    world: Any, run: Path, ended: list[FrozenTrial], mistake: Callable[..., str], change: str, field: str
) -> None:
    before = (run / "config.yaml").read_bytes()
    told = mistake("search", str(world.config), "--out", str(run), "--resume", "--set", change)
    assert told.startswith(f"blocktune: {field} differs from the run in")
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.usefixtures("in_place")
def test_another_search_over_a_run_is_refused(
    world: Any, run: Path, ended: list[FrozenTrial], mistake: Callable[..., str]
) -> None:
    told = mistake("search", str(world.config), "--out", str(run), "--set", "space.bands=2")
    assert "already holds a run" in told


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("call", [["--resume"], ["CONFIG"], ["CONFIG", "--resume"]])
def test_the_same_search_again_tells_what_is_there(
    world: Any, run: Path, ended: list[FrozenTrial], blocktune: Callable[..., tuple[int, str, str]], call: list[str]
) -> None:
    """Nothing is measured again; a resume finds its config in the run."""
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    arguments = [str(world.config) if a == "CONFIG" else a for a in call]
    code, told, _ = blocktune("search", *arguments, "--out", str(run))
    assert code == 0
    assert told.startswith(f"{run} holds this search, finished")
    confirmed = json.loads((run / "confirmed.json").read_text())["confirmed"]
    assert confirmed
    assert all(c["name"] in told for c in confirmed)
    assert f"it ended at search.trials: {TRIALS} are done" in told
    assert "--resume --set search.trials=" in told
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.usefixtures("in_place")
def test_two_searches_in_one_folder_are_refused(
    run: Path, ended: list[FrozenTrial], mistake: Callable[..., str]
) -> None:
    with (run / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        told = mistake("search", "--resume", "--out", str(run), "--set", f"search.trials={TRIALS + 1}")
    assert "is in use by another search" in told
