"""The same search on one worker and on two, and on two of which one is killed."""

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState

from benchmarks.scaling_report import compare, split

REPO = Path(__file__).parents[2]
NOON = datetime(2026, 1, 1, 12)


def trial(number: int, worker: int, start: float, end: float, generate: float, score: float) -> FrozenTrial:
    told = {"generate_seconds": generate, "score_seconds": score, "images": 4.0}
    return FrozenTrial(
        number=number, state=TrialState.COMPLETE, value=0.0, trial_id=number, params={}, distributions={},
        datetime_start=NOON + timedelta(seconds=start), datetime_complete=NOON + timedelta(seconds=end),
        user_attrs={"worker": worker, "metrics": told}, system_attrs={}, intermediate_values={},
    )  # fmt: skip


def test_the_time_of_two_workers_is_told_by_part():
    """Worker 0: trials of [0, 4] and [5, 9]; worker 1: one of [1, 7], and then there is none left for it."""
    trials = [trial(0, 0, 0, 4, 3, 0.5), trial(1, 1, 1, 7, 5, 0.5), trial(2, 0, 5, 9, 3, 0.5)]
    told = split(trials, 2)
    parts = {"generating": 11, "scoring": 1.5, "handing": 1.5, "between": 2, "end": 2}
    assert told["seconds_per_trial"] == pytest.approx({part: seconds / 3 for part, seconds in parts.items()})
    assert told["trials_per_hour"] == pytest.approx(3 * 3600 / 9)
    assert told["trials_per_hour_until_the_end"] == pytest.approx(3600 * (2 / 9 + 1 / 7))
    assert told["images_per_second"] == pytest.approx(12 / 9)


jobs = st.lists(st.tuples(*[st.floats(0.01, 5)] * 4), min_size=1, max_size=6)


@given(st.lists(jobs, min_size=1, max_size=4), jobs)
def test_parts_add_up_to_all_workers_time_and_losses_to_what_efficiency_lacks(workers, alone):
    def searched(of_workers):
        trials = []
        for worker, own in enumerate(of_workers):
            now = 0.0
            for gap, generate, score, rest in own:
                begin, now = now + gap, now + gap + generate + score + rest
                trials.append(trial(len(trials), worker, begin, now, generate, score))
        told = split(trials, len(of_workers)) | {"workers": len(of_workers)}
        whole = len(of_workers) * told["trials_seconds"]
        assert len(trials) * sum(told["seconds_per_trial"].values()) == pytest.approx(whole, abs=1e-4)
        return told

    told = compare(searched([alone]), searched(workers))
    assert sum(told["lost"].values()) == pytest.approx(1 - told["efficiency"], abs=1e-4)


def test_more_workers_do_the_same_search_and_a_kill_loses_and_doubles_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.scaling", "--model", "sd3.5-large", "--workers", "1", "2", "--kill"]
    done = subprocess.run(
        [*command, "--size", "tiny", "--trials", "6", "--out", str(tmp_path)],
        cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "scaling.tiny.json").read_text())
    assert [(s["workers"], s["killed"]) for s in told["searches"]] == [(1, False), (2, False), (2, True)]
    for search in told["searches"]:
        assert search["trials"] == len(search["keys"]) == 6
        assert search["keys"] == told["searches"][0]["keys"]
        assert all(search["held"].values()), search["held"]
        assert 0 < search["driver"]["search_thread_busy"] < 1
        assert min(search["seconds_per_trial"].values()) > -1e-6
    assert "a worker was killed amid a trial" in told["searches"][2]["held"]
    assert (tmp_path / "scaling.tiny.md").read_text() in done.stdout
    assert (tmp_path / "scaling.tiny.png").stat().st_size > 10_000
