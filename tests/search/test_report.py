"""Where the numbers stand on the picture of a front, and what is printed of the picks."""

import json
from pathlib import Path

import numpy as np
from blocktune.search.report import apart, summary
from blocktune.search.run_directory import RunDirectory
from hypothesis import given
from hypothesis import strategies as st

unit = st.floats(0, 1, allow_subnormal=False)


@given(st.lists(unit, max_size=30).map(sorted), unit)
def test_what_crowds_is_moved_apart_in_its_order_and_stays_inside(places: list[float], share: float) -> None:
    gap = share / max(1, len(places))
    moved = apart(np.array(places), gap)
    assert (np.diff(moved) >= gap - 1e-12).all()
    assert ((moved >= -1e-12) & (moved <= 1 + 1e-12)).all()


def test_what_has_room_stays() -> None:
    places = np.array([0.0, 0.2, 0.5, 1.0])
    assert np.allclose(apart(places, 0.2), places)
    assert np.allclose(apart(np.array([0.1, 0.5, 0.5, 0.9]), 0.1), [0.1, 0.45, 0.55, 0.9])


def test_what_a_pick_buys_is_printed_whole_in_lines_that_can_be_read() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu"
    record = json.loads((folder / "confirmed.json").read_text())
    several = [one for member in record["confirmed"] for one in member["best_of"]]
    table, _, *drawn = summary(RunDirectory(folder)).split("\n\n")
    assert table.startswith("candidate")
    assert several
    for told, lines in zip(several, drawn, strict=True):
        assert max(map(len, lines.splitlines())) <= 100
        words = " ".join(lines.split())
        assert f"the best of {told['count']} by {told['by']}, {told['speedup']:.2f}x: " in words
        assert all(f"{name} {told[name]}" in words for name in told.keys() - {"by", "count", "speedup"})
