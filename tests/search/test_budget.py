"""When a search ends, and that a resume goes on counting."""

import time
from typing import Any

import pytest
from blocktune.search.budget import Budget
from blocktune.search.config import Search


@pytest.mark.parametrize(
    ("limits", "spent", "field"),
    [
        ({"trials": 5}, (5, 0), "search.trials: 5 are done"),
        ({"trials": 5, "max_images": 480}, (4, 480), "search.max_images: 480 pictures are drawn"),
        ({"trials": 5, "max_images": 481}, (4, 480), None),
        ({"trials": 5, "max_minutes": 60}, (4, 480), None),
        ({"trials": 50, "patience": 30}, (30, 480), "search.patience: the hypervolume has not grown in 30 trials"),
        ({"trials": 50, "patience": 31}, (30, 480), None),
    ],
)
def test_the_first_limit_reached_ends_the_search(
    limits: dict[str, Any], spent: tuple[int, int], field: str | None
) -> None:
    assert Budget().ended(Search(**limits), *spent) == field


def test_patience_begins_anew_with_a_gain_of_one_percent() -> None:
    budget, limits = Budget(), Search(trials=99, patience=3)
    for done, volume in enumerate([0.0, 0.5, 0.504, 0.504, 0.508, 0.508, 0.508], start=1):
        stored = budget.trial(done, volume)
        assert (budget.ended(limits, done, 0) is None) == (done not in (6, 7) or done - stored["gained"] < 3)
    assert (stored["gained"], stored["volume"]) == (5, 0.508)


def test_minutes_of_all_processes_add_up() -> None:
    first = Budget(clock=time.monotonic() - 90)
    stored = first.trial(1, 0.5)
    assert stored["minutes"] == pytest.approx(1.5, abs=0.1)
    second = Budget(**stored, clock=time.monotonic() - 60)
    assert second.ended(Search(trials=9, max_minutes=2.4), 1, 0) is not None
    assert second.ended(Search(trials=9, max_minutes=2.6), 1, 0) is None
