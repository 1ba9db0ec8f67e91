"""The study in two stores: what one has been told and the other not."""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from blocktune.policies.policy import ModelIdentity
from blocktune.search.config import ConfigError, load_config
from blocktune.search.front import Point
from blocktune.search.pool import Job
from blocktune.search.progress import Display
from blocktune.search.run_directory import RunDirectory
from blocktune.search.space import Around, anchors, candidate, distributions, neighbours, suggest
from blocktune.search.study import Study, given, join_population, new_sampler
from blocktune.search.tracking import Tracker
from optuna.trial import TrialState

from benchmarks.soak import InstantPool, free

from .conftest import HANG, trials_of, until

# The command line, killed when Optuna is about to be told of trial 1, which MLflow already knows.
KILLED_BEFORE_TELL = """
import os, signal
import optuna
from blocktune.search.cli import main

tell = optuna.Study.tell
def told(study, trial, *args, **kwargs):
    if trial == 1:
        os.killpg(os.getpgid(0), signal.SIGKILL)
    return tell(study, trial, *args, **kwargs)
optuna.Study.tell = told
main()
"""


def test_a_trial_between_mlflow_and_optuna_is_told_again_and_not_measured_again(
    new_world: Callable[..., Any],
) -> None:
    world = new_world(trials=3)
    run = world.folder / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_TELL, "search", str(world.config), "--out", str(run)],
        cwd=world.cwd, env=world.environment, capture_output=True, text=True, timeout=HANG,
        start_new_session=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert trials_of(run)[1].state == TrialState.RUNNING
    until(lambda: not world.processes(), "Ray's processes end with the driver", 60)
    measured = (run / "scores" / "trial-0001.parquet").stat().st_mtime_ns
    world.run("search", "--resume", "--out", run)
    assert [t.state for t in trials_of(run)[:3]] == [TrialState.COMPLETE] * 3
    assert (run / "scores" / "trial-0001.parquet").stat().st_mtime_ns == measured
    with sqlite3.connect(run / "mlflow.db") as database:
        children = database.execute(
            "select n.value, r.status from runs r join tags n on n.run_uuid = r.run_uuid and n.key = 'trial'"
        ).fetchall()
    assert sorted(children) == [(str(number), "FINISHED") for number in range(3)]


def test_a_resume_with_another_model_under_the_same_path_is_refused(tmp_path: Path) -> None:
    """The stored study knows the model that it was made for. Of a study only what opens the stored one."""
    config = load_config(None, [])
    run = RunDirectory.open(tmp_path / "run", config, resume=False)
    study: Any = object.__new__(Study)
    study.config, study.run, study.prompts, study.baseline = config, run, (), None
    study.model = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=12, fingerprint="0" * 64)
    study._space, study._anchors = distributions(config, 12), anchors(config, 12)
    study.pool = SimpleNamespace(size=1, description=SimpleNamespace(device="none", dtype="float32", versions={}))
    for _ in range(2):
        study._open()
    waiting = study.study.get_trials()
    assert [t.user_attrs["anchor"] for t in waiting if "anchor" in t.user_attrs] == list(study._anchors)
    study.model = study.model.model_copy(update={"fingerprint": "1" * 64})
    with pytest.raises(ConfigError, match="is of another model, space or objective"):
        study._open()
    assert study.study.get_trials() == waiting
    run.release()


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii", "random"])
def test_given_choices_are_taken_and_the_sampler_goes_on_after_them(sampler: str) -> None:
    config = load_config(None, [f"search.sampler={sampler}"])
    space = distributions(config, 12)
    plain = {name: value for name, value in anchors(config, 12)["late reuse 6"].items() if name in space}
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=new_sampler(config, 0))
    for params in (plain, None, plain | {"scale_0": 1.5}):
        with given(study, params):
            trial = study.ask()
            chosen = suggest(trial, space)
        assert (chosen == params) == (params is not None)
        study.tell(trial, [0.0, 1.0])


def test_known_points_are_parents_of_a_genetic_sampler() -> None:
    """Without them the children of three known points would be drawn at random."""
    config = load_config(None, ["search.sampler=nsgaii"])
    space = distributions(config, 12)
    plain = {name: value for name, value in anchors(config, 12)["unmodified"].items() if name in space}
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=new_sampler(config, 0))
    for i in range(20):  # a population
        study.enqueue_trial(plain | {"scale_0": 1.0 + i / 100})
    for i in range(25):
        trial = study.ask()
        chosen = suggest(trial, space)
        join_population(study, trial)
        study.tell(trial, [float(i), float(i)])
        if i >= 20:
            assert sum(chosen[name] == plain[name] for name in plain) >= len(plain) - 5, chosen


@pytest.mark.parametrize("refine", [0, 0.5, 1])
def test_as_many_candidates_as_wanted_lie_near_the_front_and_none_while_known_points_wait(refine: float) -> None:
    """Of a study only what the choice is made by: its Optuna study, its front, and what is known."""
    config = load_config(None, [f"search.refine={refine}"])
    model = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=12, fingerprint="0" * 64)
    space = distributions(config, 12)
    params = {name: value for name, value in anchors(config, 12)["late reuse 6"].items() if name in space}
    known = candidate(params, config, model, "late reuse 6")
    trial = optuna.trial.create_trial(params=params, distributions=space, value=0.0, user_attrs={"key": known.key})
    study: Any = object.__new__(Study)
    study.config, study.model, study._known, study._measuring = config, model, {known.behaviour: trial}, {}
    study._around = Around(config, model)
    study.tally = SimpleNamespace(front=[Point("trial 0", 0.9, 0.9, 1.0, known.key)])
    study.study = optuna.create_study(sampler=new_sampler(config, 0))
    around = {one.key for one in neighbours(params, config, model)}
    chosen = []
    for _ in range(40):
        study.study.add_trial(trial)
        if near := study._near():
            chosen.append(candidate(near, config, model, "near").key)
    assert set(chosen) <= around
    assert len(chosen) == {0: 0, 1: 40}.get(refine, len(chosen))
    assert 10 <= len(chosen) <= 30 or refine != 0.5
    study.study.enqueue_trial({})
    assert study._near() is None


class Slow(InstantPool):
    """Eight workers that finish one job after the other; every seventh fails where `fails`."""

    size, fails, answered = 8, False, 0

    def wait(self, timeout: float | None = None) -> list[Job]:
        (job,) = self.run([self._jobs.pop(0)])
        self.answered += 1
        if self.fails and self.answered % 7 == 0:
            job.result, job.error = None, "the lamp went out"
        return [job]


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_measured_on_one_worker_is_not_measured_on_another(tmp_path: Path, fails: bool) -> None:
    small = ["bands=1", "reuse_every=[4]", "reuse_from=[0.3]", "compute_until=[]", "forecast=false", "operands=[value]"]
    settings = [f"space.{choice}" for choice in small] + ["search.sampler=random", "search.trials=60"]
    settings += ["space.max_scale=1.02", "space.guidance_until=[0.5]"]  # nothing is louder: eight do something else
    config = load_config(None, settings)
    model = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=12, fingerprint="0" * 64)
    pool: Any = Slow(config, model, free(12), config.prompts.search_images)
    run = RunDirectory.open(tmp_path / "run", config, resume=False)
    run.write_text(run.path / "cost_table.json", pool.costs.model_dump_json())
    with Display() as display:
        tracker = Tracker(config, run.path, "test")
        study = Study(config, run, pool, tracker, display)
        pool.fails, pool.answered = fails, 0
        study.search()
        tracker.close()
    run.release()
    trials = study.study.get_trials()
    assert len(trials) == 60
    assert {t.state for t in trials} == {TrialState.COMPLETE} | ({TrialState.FAIL} if fails else set())
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    first = {study._stored(t).behaviour: t for t in complete if "same_as" not in t.user_attrs}
    assert len(first) == sum("same_as" not in t.user_attrs for t in complete)  # each was measured once
    for trial in complete:
        known = first[study._stored(trial).behaviour]
        assert trial.user_attrs.get("same_as", trial.number) == known.number
        assert (trial.values, trial.user_attrs["key"]) == (known.values, known.user_attrs["key"])
    assert all(t.user_attrs["reason"] == "the lamp went out" for t in trials if t.state == TrialState.FAIL)
