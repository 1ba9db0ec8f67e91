import warnings
from functools import partial
from itertools import product

import numpy as np
import pytest
from blocktune.evaluators import (
    holm,
    mcnemar,
    minimum_detectable_difference,
    paired_bootstrap,
    paired_interval,
    paired_t_test,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

scores = st.integers(2, 30).flatmap(lambda n: arrays(np.float64, (2, n), elements=st.floats(-1, 1, width=32)))


@given(scores)
def test_means_and_order(pair):
    result = paired_interval(*pair)
    assert result.value == pytest.approx(pair[0].mean())
    assert result.baseline == pytest.approx(pair[1].mean())
    assert result.delta == pytest.approx(result.value - result.baseline, abs=1e-12)
    assert result.low <= result.delta <= result.high
    assert (result.level, result.n) == (0.95, pair.shape[1])
    assert paired_interval(*pair) == result


@given(scores)
def test_swapping_the_sides_mirrors_the_interval(pair):
    forth, back = paired_interval(pair[0], pair[1]), paired_interval(pair[1], pair[0])
    assert (back.delta, back.low, back.high) == pytest.approx((-forth.delta, -forth.high, -forth.low), abs=1e-12)


@given(scores, st.floats(-2, 2), st.floats(0.1, 5))
def test_shift_and_scale(pair, shift, scale):
    plain, moved = paired_interval(*pair), paired_interval(pair[0] * scale + shift, pair[1] * scale)
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
    difference = rng.normal(0.1, 0.3, n)
    result = paired_interval(baseline + difference, baseline)
    half = t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n)
    assert (result.low, result.high) == pytest.approx((difference.mean() - half, difference.mean() + half))


def covered(draw, truth: float, groups=None, data_sets: int = 2000, of=paired_interval) -> float:
    """Share of simulated data sets whose interval holds the true difference."""
    hits = 0
    for seed in range(data_sets):
        result = of(*draw(np.random.default_rng(seed)), groups)
        hits += result.low <= truth <= result.high
    return hits / data_sets


def dense(rng, n):
    baseline = rng.random(n)
    return baseline + rng.normal(0.02, 0.2, n), baseline


def skewed(rng, n):  # scores in [0, 1] as judges give them: most pictures are right, few are moved a long way
    baseline = rng.beta(4, 1, n)
    moved = np.repeat(rng.random(n // 3) < 0.4, 3)
    return np.where(moved, rng.beta(5, 1, n), baseline), baseline


def binary(rng, n):
    chance = np.repeat(rng.beta(2, 1, n // 3), 3)  # of being right, by prompt
    baseline = rng.random(n) < chance
    return np.where(rng.random(n) < 0.3, rng.random(n) < 0.9, baseline), baseline


DRAWN = [(dense, 0.02), (skewed, 0.4 * (5 / 6 - 4 / 5)), (binary, 0.3 * (0.9 - 2 / 3))]


@pytest.mark.parametrize("prompts", [24, 96, 576])
@pytest.mark.parametrize(("draw", "truth"), DRAWN)
def test_coverage_of_whole_prompts(draw, truth, prompts):
    n = 3 * prompts
    # three standard errors of 2,000 data sets are 1.5 points
    assert 0.93 <= covered(lambda rng: draw(rng, n), truth, np.repeat(np.arange(prompts), 3)) <= 0.97


@pytest.mark.parametrize(("prompts", "data_sets"), [(96, 1000), (576, 400)])
@pytest.mark.parametrize(("draw", "truth"), DRAWN)
def test_coverage_of_the_bootstrap(draw, truth, prompts, data_sets):
    groups = np.repeat(np.arange(prompts), 3)
    bootstrap = partial(paired_bootstrap, resamples=400)
    assert 0.93 <= covered(lambda rng: draw(rng, 3 * prompts), truth, groups, data_sets, bootstrap) <= 0.97


def test_the_bootstrap_is_too_narrow_for_few_prompts():
    """Why intervals are Student's t: on the same ten prompts that holds the truth as often as it says."""
    told = [
        covered(lambda rng: dense(rng, 10), 0.02, of=of)
        for of in (paired_interval, partial(paired_bootstrap, resamples=400))
    ]
    assert told[1] < 0.92 < 0.93 < told[0]


def test_the_bootstrap_draws_whole_prompts():
    groups = np.repeat(np.arange(40), 4)
    rng = np.random.default_rng(0)
    baseline = rng.random(160)
    policy = baseline + np.repeat(rng.normal(0.1, 0.3, 40), 4)
    told, apart = paired_bootstrap(policy, baseline, groups), paired_bootstrap(policy, baseline)
    t = paired_interval(policy, baseline, groups, scale=2.0)
    assert (told.low, told.high) == pytest.approx((t.low, t.high), abs=0.1 * (t.high - t.low))
    assert apart.high - apart.low < 0.6 * (told.high - told.low)
    assert paired_bootstrap(policy, baseline, groups) == told
    other = paired_bootstrap(policy, baseline, [f"prompt {g}" for g in groups], level=0.99, scale=2.0, seed=1)
    assert (other.delta, other.n, other.level, other.scale) == (t.delta, 160, 0.99, 2.0)
    assert other.low < told.low < told.high < other.high
    assert paired_bootstrap(baseline, baseline, groups).points == "+0.0 [+0.0, +0.0]"


@given(scores)
def test_the_t_test_claims_what_the_interval_leaves_zero_out_of(pair):
    p = paired_t_test(*pair)
    assert 0 <= p <= 1
    for level in (0.5, 0.95):
        result = paired_interval(*pair, level=level)
        if abs(p - (1 - level)) > 1e-9:
            assert (p < 1 - level) == (result.low > 0 or result.high < 0)


def test_the_t_test_is_the_paired_one():
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    policy, baseline = rng.random(30) + 0.2, rng.random(30)
    assert paired_t_test(policy, baseline) == pytest.approx(ttest_rel(policy, baseline).pvalue)
    assert paired_t_test([1.0, 1.0], [0.0, 0.0]) == 0
    assert paired_t_test([1.0, 1.0], [1.0, 1.0]) == 1


def test_coverage_of_ten_groups():
    assert 0.93 <= covered(lambda rng: dense(rng, 10), 0.02) <= 0.97


def test_coverage_where_next_to_nothing_differs():
    """Too narrow, as the docstring says, and never wider than it should be."""

    def draw(rng):
        changed, up = rng.random(24) < 0.07, rng.random(24) < 2 / 3
        return (changed & up).astype(float), (changed & ~up).astype(float)

    assert 0.75 <= covered(draw, 0.07 / 3) <= 0.95


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


def test_unequal_groups_by_hand():
    """Mean 1/2 of four; residuals of the groups' sums are 1/2, -1/2 and 0, so its error is sqrt(3/2 / 2) / 4."""
    result = paired_interval([1.0, 0.0, 1.0, 0.0], [0.0] * 4, ["a", "b", "c", "c"])
    assert result.high - 0.5 == pytest.approx(4.302653 * np.sqrt(3 / 4) / 4, rel=1e-6)


def test_level():
    rng = np.random.default_rng(0)
    policy, baseline = rng.random(50), rng.random(50)
    widths = [(r := paired_interval(policy, baseline, level=level)).high - r.low for level in (0.5, 0.9, 0.95, 0.995)]
    assert widths == sorted(widths)


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
    ],
)
def test_refuses(arguments, said):
    with pytest.raises(ValueError, match=said):
        paired_interval(*arguments)


def test_two_groups_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = paired_interval([0.0, 1.0], [0.0, 0.0])
    assert (result.low, result.high) == pytest.approx((0.5 - 12.706205 / 2, 0.5 + 12.706205 / 2))  # t of one degree


@pytest.mark.parametrize(
    ("policy", "baseline", "p"),
    [
        ([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1], 14 / 64),  # 5 against 1: (1 + 6) / 64 on each side
        ([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], 2 / 64),
        ([1, 0], [0, 1], 1),
        ([1, 0, 1], [1, 0, 1], 1),  # nothing differs
        ([], [], 1),
    ],
)
def test_mcnemar_by_hand(policy, baseline, p):
    assert mcnemar(policy, baseline) == pytest.approx(p)
    assert mcnemar(baseline, policy) == pytest.approx(p)
    assert mcnemar([*policy, 1, 0], [*baseline, 1, 0]) == pytest.approx(p)  # pairs that agree say nothing
    assert mcnemar(np.array(policy, bool), np.array(baseline, bool)) == pytest.approx(p)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_mcnemar_is_binomial(pair):
    from scipy.stats import binomtest

    n, first = pair
    policy = np.arange(n) < first
    assert mcnemar(policy, ~policy) == pytest.approx(binomtest(first, n).pvalue)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=2, max_size=24))
def test_mcnemar_of_prompts_is_by_all_ways_to_change_sides(rows):
    """Every prompt's pictures are the policy's or the baseline's: 2^prompts ways, of which those as uneven count."""
    groups, policy, baseline = ([*column] for column in zip(*[*rows, (4, True, True)], strict=True))
    leads = [sum(p - b for g, p, b in zip(groups, policy, baseline, strict=True) if g == one) for one in set(groups)]
    sums = [
        sum(s * lead for s, lead in zip(signs, leads, strict=True)) for signs in product((1, -1), repeat=len(leads))
    ]
    expected = np.mean([abs(s) >= abs(sum(leads)) for s in sums])
    assert mcnemar(policy, baseline, groups) == pytest.approx(expected)


def test_mcnemar_errs_as_often_as_it_says():
    rng = np.random.default_rng(0)
    claims = 0
    for _ in range(1000):
        baseline = rng.random(100) < 0.6
        other = rng.random(100) < 0.3  # as often right as before, but elsewhere
        claims += mcnemar(np.where(other, rng.random(100) < 0.6, baseline), baseline) < 0.05
    assert claims / 1000 <= 0.05  # exact tests of few pairs err less often than they may


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.04, 0.01], [0.04, 0.02]),
        ([0.5, 0.6], [1, 1]),
        ([0.2], [0.2]),
        ([0, 0, 1], [0, 0, 1]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values, adjusted):
    np.testing.assert_allclose(holm(p_values), adjusted, rtol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_none_and_bonferroni_and_keeps_the_order(p_values):
    p, adjusted = np.array(p_values), holm(p_values)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, p * len(p)) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_holm_keeps_the_error_of_the_family():
    """Ten comparisons with one baseline, so that their errors go together; three differ truly."""
    rng = np.random.default_rng(1)
    from scipy.stats import ttest_rel

    plain, family, found, families = 0, 0, 0, 600
    for _ in range(families):
        baseline = rng.normal(0, 1, 60)
        policies = baseline[:, None] * 0.5 + rng.normal(0, 1, (60, 10))
        policies[:, :3] += 0.8
        p = ttest_rel(policies, baseline[:, None]).pvalue
        plain += (p[3:] < 0.05).any()
        family += (holm(p)[3:] < 0.05).any()
        found += (holm(p)[:3] < 0.05).all()
    # three standard errors of a simulated 5 % are 2.7 points
    assert family / families <= 0.077
    assert plain / families > 0.12
    assert found / families > 0.5


@pytest.mark.parametrize(("n", "level", "power"), [(10, 0.95, 0.8), (64, 0.95, 0.8), (64, 0.99, 0.5), (256, 0.9, 0.95)])
def test_the_detectable_difference_is_detected_at_the_stated_power(n, level, power):
    from scipy.stats import t

    rng = np.random.default_rng(2)
    delta = minimum_detectable_difference(n, 0.3, level, power)
    draws = rng.normal(delta, 0.3, (4000, n))
    low = draws.mean(1) - t.ppf((1 + level) / 2, n - 1) * draws.std(1, ddof=1) / np.sqrt(n)
    assert (low > 0).mean() == pytest.approx(power, abs=0.025)


def test_the_detectable_difference_is_detected_by_the_interval_too():
    rng = np.random.default_rng(3)
    delta = minimum_detectable_difference(64, 0.3)
    detected = 0
    for _ in range(400):
        baseline = rng.random(64)
        result = paired_interval(baseline + rng.normal(delta, 0.3, 64), baseline)
        detected += result.low > 0
    assert detected / 400 == pytest.approx(0.8, abs=0.06)


@given(st.integers(2, 3000), st.just(0.0) | st.floats(1e-6, 3), st.floats(0.5, 0.99), st.floats(0.55, 0.99))
@settings(max_examples=50)
def test_the_detectable_difference_is_in_units_of_the_spread(n, spread, level, power):
    delta = minimum_detectable_difference(n, spread, level, power)
    assert delta == pytest.approx(spread * minimum_detectable_difference(n, 1, level, power), rel=1e-6)
    assert spread == 0 or delta > minimum_detectable_difference(n + 1, spread, level, power)
    assert spread == 0 or delta < minimum_detectable_difference(n, spread, level, power + 0.005)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mcnemar([1, 0.5], [0, 1]), "policy_correct has the score 0.5"),
        (lambda: mcnemar([1, 0], [0, 2]), "baseline_correct has the score 2.0"),
        (lambda: mcnemar([1, 0], [0]), "policy_correct has 2 scores, baseline_correct 1"),
        (lambda: mcnemar([np.nan], [0]), "policy_correct has 1 of 1 scores that are NaN"),
        (lambda: holm([0.1, 1.1]), "p_values has 1.1; accepted: 0 to 1"),
        (lambda: holm([0.1, np.nan]), "p_values has 1 of 2 scores that are NaN"),
        (lambda: minimum_detectable_difference(1, 0.1), "n is 1; accepted: 2 or more"),
        (lambda: minimum_detectable_difference(9, -0.1), "spread is -0.1; accepted: 0 or more"),
        (lambda: minimum_detectable_difference(9, float("nan")), "spread is nan"),
        (lambda: minimum_detectable_difference(9, 0.1, level=95), "level is 95"),
        (lambda: minimum_detectable_difference(9, 0.1, power=1), "power is 1; accepted: between 0 and 1"),
        (lambda: minimum_detectable_difference(9, 0.1, power=0.02), "power is 0.02; accepted: more than 0.025"),
    ],
)
def test_tests_and_power_refuse(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_points_are_hundredths_of_the_scale():
    before, after = [20.0, 21.0, 22.0], [20.7, 21.7, 22.7]
    assert paired_interval(after, before).points == "+70.0 [+70.0, +70.0]"
    assert paired_interval(after, before, scale=7.0).points == "+10.0 [+10.0, +10.0]"
