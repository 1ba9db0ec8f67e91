"""The study in two stores: what one has been told and the other not."""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from optuna.trial import TrialState

from .conftest import trials_of, until

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
        cwd=world.cwd, env=world.environment, capture_output=True, text=True, timeout=200,
        start_new_session=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert trials_of(run)[1].state == TrialState.RUNNING
    until(lambda: not world.processes(), 60, "Ray's processes end with the driver")
    measured = (run / "scores" / "trial-0001.parquet").stat().st_mtime_ns
    world.run("search", "--resume", "--out", run)
    assert [t.state for t in trials_of(run)[:3]] == [TrialState.COMPLETE] * 3
    assert (run / "scores" / "trial-0001.parquet").stat().st_mtime_ns == measured
    with sqlite3.connect(run / "mlflow.db") as database:
        children = database.execute(
            "select n.value, r.status from runs r join tags n on n.run_uuid = r.run_uuid and n.key = 'trial'"
        ).fetchall()
    assert sorted(children) == [(str(number), "FINISHED") for number in range(3)]
