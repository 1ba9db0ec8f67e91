"""p-values of what was confirmed, from scores per picture alone."""

import numpy as np
import pandas as pd
import pytest
from blocktune.evaluators import Latency
from blocktune.search.config import Objectives
from blocktune.search.confirm import adjusted_p_values, ends_as_one
from scipy.stats import binomtest, ttest_rel

OBJECTIVES = Objectives(alignment="shapes", quality="crispness", reported=("shapes_binary", "psnr", "ssim"))


def scores(gain: float, seed: int, prompts: int = 80) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    dense = np.random.default_rng(0).random(prompts) + gain + rng.normal(0, 0.1, prompts)
    told = {"shapes": dense, "shapes_binary": (dense > 0.5).astype(float), "psnr": 20 + dense, "ssim": np.ones(prompts)}
    return pd.DataFrame({"prompt": [f"prompt {i}" for i in range(prompts)], **told})


def test_p_values_are_those_of_the_tests_times_how_many_are_left() -> None:
    before, after = scores(0, 0), [scores(0.02, 1), scores(0.1, 2), scores(0.001, 3)]
    told = adjusted_p_values(OBJECTIVES, before, after)
    assert [one.keys() for one in told] == [{"shapes", "shapes_binary"}] * 3  # likeness is no difference
    plain = {
        "shapes": [ttest_rel(a["shapes"], before["shapes"]).pvalue for a in after],
        "shapes_binary": [
            binomtest(np.count_nonzero(d > 0), np.count_nonzero(d)).pvalue
            for d in (a["shapes_binary"] - before["shapes_binary"] for a in after)
        ],
    }
    for name, p in plain.items():
        one, two, three = sorted(p)
        adjusted = [3 * one, max(3 * one, 2 * two), max(3 * one, 2 * two, three)]
        assert sorted(t[name] for t in told) == pytest.approx(np.minimum(adjusted, 1))


def test_pictures_of_one_prompt_are_one_piece_of_evidence() -> None:
    before, after = scores(0, 0), scores(0.05, 1)
    four = [pd.concat([table] * 4) for table in (before, after)]
    (once,), (again,) = adjusted_p_values(OBJECTIVES, before, [after]), adjusted_p_values(OBJECTIVES, four[0], four[1:])
    assert once == pytest.approx(again)
    assert once["shapes"] < 0.05


def test_a_drift_within_a_turn_is_shared_by_both_ends() -> None:
    """Each run takes a tenth longer than the one before; the one in the middle is as fast as the ends."""
    ends, middle = ends_as_one([Latency(1.0, 0.5), Latency(1.1, 0.55), Latency(1.2, 0.6)])
    assert (ends.pipeline, ends.transformer) == pytest.approx((middle.pipeline, middle.transformer))
    assert middle == Latency(1.1, 0.55)


def test_nothing_confirmed() -> None:
    assert adjusted_p_values(OBJECTIVES, scores(0, 0), []) == []
