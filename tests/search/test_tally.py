"""What is added trial by trial is what all trials come to."""

from typing import Any

import optuna
import pytest
from blocktune.search.front import Baseline, hypervolume, non_dominated
from blocktune.search.storage import feasible, point_of
from blocktune.search.tally import Tally
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

BASELINE = Baseline("unmodified", 0.5, 0.5, 1.0, key="base", scales=(1.0, 1.0))
grid = st.integers(0, 4)
outcomes = st.sampled_from(["complete", "complete", "dropped", "infeasible", "same", "failed", "killed"])


def trial(number: int, outcome: str, alignment: int, quality: int, latency: int) -> optuna.trial.FrozenTrial:
    metrics = {"images": 8.0 + number, "generate_seconds": 2.0, "score_seconds": 0.5, "steps_saved": latency / 8}
    attrs: dict[str, Any] = {"key": f"k{number}", "steps": 20 - number}
    attrs |= {"dropped": {"dropped": True}, "same": {"same_as": 0}, "failed": {"reason": "lamp"}}.get(outcome, {})
    if outcome in ("failed", "killed"):
        return optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attrs)
    return optuna.trial.create_trial(
        values=[0.4 + alignment / 20, 0.4 + quality / 20, 0.2 + latency / 5], user_attrs=attrs | {"metrics": metrics},
        system_attrs={"constraints:insane": float(outcome == "infeasible")},
    )  # fmt: skip


@given(st.lists(st.tuples(outcomes, grid, grid, grid), max_size=8))
def test_a_tally_is_what_all_trials_come_to(rows: list[tuple]) -> None:
    study = optuna.create_study(directions=["maximize", "maximize", "minimize"])
    study.add_trials([trial(i, *row) for i, row in enumerate(rows)])
    tally = Tally(BASELINE, 96)
    for told in study.get_trials():
        tally.add(told)
    points = [point_of(t) for t in feasible(study)]
    assert len(points) == sum(row[0] in ("complete", "same") for row in rows)
    assert tally.front == non_dominated(points)
    assert tally.finished == sum(row[0] != "killed" for row in rows)
    measured = [i for i, row in enumerate(rows) if row[0] in ("complete", "dropped", "infeasible")]
    images = sum(8 + i for i in measured)
    assert tally.spent["images"] == images
    assert tally.spent["worker_seconds"] == 2.5 * len(measured)
    steps = {i: (8 + i) * (20 - i) for i in measured}  # of all pictures
    saved = sum(n * rows[i][3] / 8 for i, n in steps.items()) / max(1, sum(steps.values()))
    assert tally.spent["steps_saved"] == pytest.approx(saved)
    assert bool(tally.standing) == bool(points)
    if points:
        assert tally.standing == {
            "best_alignment": max(p.alignment for p in points),
            "best_quality": max(p.quality for p in points),
            "best_speedup": max(1.0 / p.latency for p in points),
            "hypervolume": pytest.approx(hypervolume(points, BASELINE), abs=1e-9),
            "front": len(tally.front),
            "failed": sum(row[0] in ("failed", "killed") for row in rows),
        }
