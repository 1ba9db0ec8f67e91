"""How curves of several seeds become one figure."""

import numpy as np
import pytest

from benchmarks.samplers import interval, summary


def test_a_curve_is_read_at_what_was_drawn_by_then():
    """Proposals that repeat draw nothing, so that the second search ends at 20 pictures and holds its volume."""
    of_seeds = [[(10, 1.0), (20, 2.0), (30, 4.0)], [(10, 1.0), (10, 1.0), (20, 3.0)]]
    still = [[(10, 1.0), (20, 1.0), (30, 1.0)]] * 2
    told = summary({"tpe": of_seeds, "random": still}, pictures=10, candidates=3)
    assert told["pictures"] == [10, 20, 30]
    assert told["tpe"]["mean"] == [1.0, 2.5, 3.5]
    assert told["tpe"]["gain_over_random"][0] == pytest.approx(2.5)
    assert told["random"]["half"] == [0.0, 0.0, 0.0]


def test_the_interval_is_students():
    mean, half = interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
