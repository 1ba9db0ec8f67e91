import time
import warnings

import numpy as np
import pytest
from blocktune.evaluators import Interval, paired_interval
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

scores = st.integers(2, 30).flatmap(lambda n: arrays(np.float64, (2, n), elements=st.floats(-1, 1, width=32)))


def quick(policy, baseline, groups=None, **options) -> Interval:
    return paired_interval(policy, baseline, groups, **{"resamples": 200, **options})


@given(scores)
@settings(deadline=None)
def test_means_and_order(pair):
    result = quick(*pair)
    assert result.value == pytest.approx(pair[0].mean())
    assert result.baseline == pytest.approx(pair[1].mean())
    assert result.delta == pytest.approx(result.value - result.baseline, abs=1e-12)
    assert result.low <= result.delta <= result.high
    assert result.low >= (pair[0] - pair[1]).min() - 1e-12
    assert result.high <= (pair[0] - pair[1]).max() + 1e-12
    assert (result.level, result.n) == (0.95, pair.shape[1])
    assert quick(*pair) == result


@given(scores)
@settings(deadline=None)
def test_swapping_the_sides_mirrors_the_interval(pair):
    forth, back = quick(pair[0], pair[1]), quick(pair[1], pair[0])
    assert (back.delta, back.low, back.high) == pytest.approx((-forth.delta, -forth.high, -forth.low), abs=1e-12)


@given(scores, st.floats(-2, 2), st.floats(0.1, 5))
@settings(deadline=None)
def test_shift_and_scale(pair, shift, scale):
    plain, moved = quick(*pair), quick(pair[0] * scale + shift, pair[1] * scale)
    expected = [plain.delta * scale + shift, plain.low * scale + shift, plain.high * scale + shift]
    assert [moved.delta, moved.low, moved.high] == pytest.approx(expected, abs=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("groups", [None, [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]])
def test_no_difference_and_a_constant_one(groups):
    baseline = np.random.default_rng(0).random(10)
    same = paired_interval(baseline, baseline, groups)
    assert (same.delta, same.low, same.high) == (0, 0, 0)
    more = paired_interval(baseline + 0.1, baseline, groups)
    assert [more.delta, more.low, more.high] == pytest.approx([0.1] * 3, abs=1e-12)


@pytest.mark.parametrize("n", [8, 60, 1000])
def test_width_is_that_of_students_t(n):
    from scipy.stats import t

    rng = np.random.default_rng(3)
    baseline = rng.random(n)
    half_of_them = rng.normal(0, 0.3, n // 2)
    difference = 0.1 + np.concatenate([half_of_them, -half_of_them])  # no skew: the interval is symmetric as t's is
    result = paired_interval(baseline + difference, baseline)
    half = t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n)
    assert result.high - result.low == pytest.approx(2 * half, rel=0.12 if n == 8 else 0.05)
    assert (result.high + result.low) / 2 == pytest.approx(difference.mean(), abs=0.12 * half)


def covered(draw, truth: float, groups=None, data_sets: int = 400) -> float:
    """Share of simulated data sets whose interval holds the true difference."""
    hits = 0
    for seed in range(data_sets):
        policy, baseline = draw(np.random.default_rng(seed))
        result = paired_interval(policy, baseline, groups, resamples=400, seed=seed + 1_000_000)
        hits += result.low <= truth <= result.high
    return hits / data_sets


def test_coverage_of_dense_scores():
    def draw(rng):
        baseline = rng.random(60)
        return baseline + rng.normal(0.02, 0.2, 60), baseline

    assert 0.92 <= covered(draw, 0.02) <= 0.98


def test_coverage_of_few_groups():
    def draw(rng):
        baseline = rng.random(10)
        return baseline + rng.normal(-0.05, 0.2, 10), baseline

    assert 0.92 <= covered(draw, -0.05) <= 0.98


def test_coverage_of_binary_scores():
    def draw(rng):
        baseline = rng.random(200) < 0.7
        return np.where(rng.random(200) < 0.2, rng.random(200) < 0.88, baseline), baseline

    # 0.036 lies between the values k / 200 that ends of intervals take: no end is the truth by chance
    assert 0.92 <= covered(draw, 0.2 * (0.88 - 0.7)) <= 0.98


def test_pictures_of_one_prompt_go_together():
    groups = np.repeat(np.arange(30), 4)

    def draw(rng):
        baseline = rng.random(120)
        return baseline + 0.03 + np.repeat(rng.normal(0, 0.2, 30), 4) + rng.normal(0, 0.05, 120), baseline

    assert 0.92 <= covered(draw, 0.03, groups) <= 0.98
    assert covered(draw, 0.03) < 0.75  # pictures taken for independent: an interval half as wide


def test_unequal_groups_weigh_by_their_pictures():
    groups = ["a"] * 9 + ["b"] * 1 + ["c"] * 2
    policy = np.array([1.0] * 9 + [0.0] * 3)
    result = paired_interval(policy, np.zeros(12), groups)
    assert result.delta == pytest.approx(0.75)
    assert result.n == 12


def test_names_of_groups_do_not_matter():
    rng = np.random.default_rng(0)
    policy, baseline, ids = rng.random(40), rng.random(40), rng.integers(0, 12, 40)
    assert paired_interval(policy, baseline, ids) == paired_interval(policy, baseline, [f"prompt {i}" for i in ids])


def test_level_and_seed():
    rng = np.random.default_rng(0)
    policy, baseline = rng.random(50), rng.random(50)
    widths = [(r := paired_interval(policy, baseline, level=level)).high - r.low for level in (0.5, 0.9, 0.95, 0.995)]
    assert widths == sorted(widths)
    assert paired_interval(policy, baseline, seed=1) == paired_interval(policy, baseline, seed=1)
    assert paired_interval(policy, baseline, seed=1) != paired_interval(policy, baseline, seed=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1.0, np.nan, np.nan], [0.0] * 3), "policy_scores has 2 of 3 scores that are NaN"),
        (([1.0, 2.0], [0.0, np.inf]), "baseline_scores has 1 of 2"),
        (([1.0, 2.0], [0.0] * 3), "policy_scores has 2 scores, baseline_scores 3"),
        (([[1.0, 2.0]], [0.0]), r"policy_scores has shape \(1, 2\)"),
        (([1.0], [0.0]), "groups has 1 different ids"),
        (([], []), "groups has 0 different ids"),
        (([1.0, 2.0], [0.0, 0.0], ["a", "a"]), "groups has 1 different ids"),
        (([1.0, 2.0], [0.0, 0.0], ["a", "b", "c"]), "groups has 3 ids for 2 scores"),
        (([1.0, 2.0], [0.0, 0.0], None, 95), "level is 95"),
        (([1.0, 2.0], [0.0, 0.0], None, 0.999, 100), "resamples is 100, too few for level 0.999"),
    ],
)
def test_refuses(arguments, said):
    with pytest.raises(ValueError, match=said):
        paired_interval(*arguments)


def test_two_groups_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = paired_interval([0.0, 1.0], [0.0, 0.0])
    assert (result.low, result.high) == (0, 1)


def test_a_thousand_groups_take_less_than_a_second():
    rng = np.random.default_rng(0)
    policy, baseline = rng.random(4000), rng.random(4000)
    groups = np.repeat(np.arange(1000), 4)
    paired_interval([0, 1], [0, 0])  # imports scipy.special
    start = time.perf_counter()
    paired_interval(policy, baseline, groups, resamples=10_000)
    assert time.perf_counter() - start < 1
