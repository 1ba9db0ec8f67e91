"""Whether a policy scores differently from the unmodified model: paired intervals, exact tests, and what n can tell.

Scores are paired: the same prompt and seed stand at the same position of both arrays. Pictures of one prompt are alike,
so whole prompts are what is independent, not pictures. For `m` comparisons at once, ask for `level=1 - 0.05 / m`
(Bonferroni), or adjust p-values by `holm`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Interval:
    """Mean score of the policy and of the baseline, their difference with its interval at `level`, and `n` pictures.

    `scale` is the width of scores that counts as 100 points, as `scale_of` the evaluator tells.
    """

    value: float
    baseline: float
    delta: float
    low: float
    high: float
    level: float
    n: int
    scale: float = 1.0

    @property
    def in_points(self) -> tuple[float, float, float]:
        """The difference in points, and the ends of its interval."""
        return 100 * self.delta / self.scale, 100 * self.low / self.scale, 100 * self.high / self.scale

    @property
    def points(self) -> str:
        """The difference in points: `+1.4 [-3.0, +5.8]`."""
        delta, low, high = self.in_points
        return f"{delta:+.1f} [{low:+.1f}, {high:+.1f}]"


def paired_interval(
    policy_scores: ArrayLike,
    baseline_scores: ArrayLike,
    groups: Sequence | np.ndarray | None = None,
    level: float = 0.95,
    scale: float = 1.0,
) -> Interval:
    """The mean difference policy minus baseline, with a Student's t interval over groups; `scale` is the interval's.

    Scores are `(n,)` each, `groups` `(n,)` ids of which equal ones stay together (the prompt); without them every
    picture is its own group. The mean is over pictures, a ratio of sums of groups; its standard error is of that ratio,
    linearised, with as many degrees of freedom as groups less one (Cochran 1977, Sampling Techniques, 2.11 and 6.3).

    In simulations of skewed, dense and binary scores, three pictures to a prompt, a nominal 95 % held the truth 93.6 to
    95.2 % of the time for 24, 96 and 576 prompts; percentile, BCa and studentised bootstraps were too narrow for 24.
    Where next to nothing differs it is too narrow as well: of 24 pictures with 7 % unequal pairs of binary scores 80 %,
    for often none differs, and equal scores everywhere give [0, 0], which proves nothing. Raises ValueError for scores
    that are not finite, unequal lengths, and fewer than two groups.
    """
    from scipy.special import stdtrit

    policy, baseline = _pairs(policy_scores, baseline_scores)
    _check_level(level)
    delta, error, freedom = _mean_and_error(policy - baseline, groups)
    half = float(stdtrit(freedom, (1 + level) / 2) * error)
    return Interval(
        float(policy.mean()), float(baseline.mean()), delta, delta - half, delta + half, level, len(policy), scale
    )


def paired_t_test(
    policy_scores: ArrayLike, baseline_scores: ArrayLike, groups: Sequence | np.ndarray | None = None
) -> float:
    """p-value, two-sided, that policy and baseline score the same on average, by the t of `paired_interval`.

    It is below 1 - level just where that interval leaves zero out. 1 where nothing differs. Takes and raises the same.
    """
    from scipy.special import stdtr

    policy, baseline = _pairs(policy_scores, baseline_scores)
    delta, error, freedom = _mean_and_error(policy - baseline, groups)
    if delta == 0 or error == 0:
        return float(delta == 0)
    return float(2 * stdtr(freedom, -abs(delta) / error))


def paired_bootstrap(
    policy_scores: ArrayLike,
    baseline_scores: ArrayLike,
    groups: Sequence | np.ndarray | None = None,
    level: float = 0.95,
    scale: float = 1.0,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """As `paired_interval`, with the percentiles of means over groups drawn anew, with replacement and whole.

    Efron 1979 (doi:10.1214/aos/1176344552), by `resamples` draws of `seed`. It takes no form for granted, and its ends
    need not lie alike on both sides of the mean; but the spread of few groups is taken for the true one. In the
    simulations of `paired_interval` a nominal 95 % held the truth 94.1 to 95.1 % of the time for 96 and 576 prompts,
    and 90.1 to 92.4 % for 24, where the t interval is the one to use. Raises ValueError as that does.
    """
    policy, baseline = _pairs(policy_scores, baseline_scores)
    _check_level(level)
    sums, counts = _clusters(policy - baseline, groups)
    rng, rows = np.random.default_rng(seed), max(1, 10**6 // len(sums))  # at once, for the memory's sake
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, len(sums), (min(rows, resamples - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    delta = float(sums.sum() / counts.sum())
    return Interval(
        float(policy.mean()), float(baseline.mean()), delta, float(low), float(high), level, len(policy), scale
    )


def _pairs(policy_scores: ArrayLike, baseline_scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    policy, baseline = _scores("policy_scores", policy_scores), _scores("baseline_scores", baseline_scores)
    if len(policy) != len(baseline):
        raise ValueError(f"policy_scores has {len(policy)} scores, baseline_scores {len(baseline)}; accepted: pairs")
    return policy, baseline


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; accepted: between 0 and 1, as 0.95")


def _mean_and_error(differences: np.ndarray, groups: Sequence | np.ndarray | None) -> tuple[float, float, int]:
    """The mean over pictures, its standard error over groups, and the degrees of freedom of that."""
    sums, counts = _clusters(differences, groups)
    delta = float(sums.sum() / counts.sum())
    n = len(sums)
    residuals = sums - delta * counts
    return delta, float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / counts.sum()), n - 1


def _scores(field: str, values: ArrayLike) -> np.ndarray:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"{field} has shape {scores.shape}; accepted: one score per picture, (n,)")
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise ValueError(f"{field} has {bad} of {len(scores)} scores that are NaN or infinite; accepted: finite scores")
    return scores


def _clusters(differences: np.ndarray, groups: Sequence | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum of differences and number of pictures per group, `(groups,)` each."""
    if groups is None:
        sums, counts = differences, np.ones(len(differences))
    else:
        ids = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        index = np.array([ids[group] for group in groups], dtype=np.intp)
        if len(index) != len(differences):
            raise ValueError(f"groups has {len(index)} ids for {len(differences)} scores; accepted: one per score")
        sums, counts = np.bincount(index, differences), np.bincount(index).astype(np.float64)
    if len(sums) < 2:
        raise ValueError(f"groups has {len(sums)} different ids; accepted: two or more, as an interval needs a spread")
    return sums, counts


def mcnemar(
    policy_correct: ArrayLike, baseline_correct: ArrayLike, groups: Sequence | np.ndarray | None = None
) -> float:
    """p-value, two-sided and exact, that policy and baseline are right equally often: for binary scores, `(n,)` each.

    McNemar's test: of the pictures that only one of the two has right, each would as likely be the other's. Pictures
    are taken for independent; with `groups`, as of `paired_interval`, the pictures of one prompt change sides together,
    so that each prompt counts by how many more of its pictures one of the two has right. 1 where none differ. Raises
    ValueError for unequal lengths and for scores other than 0 and 1.
    """
    policy, baseline = _scores("policy_correct", policy_correct), _scores("baseline_correct", baseline_correct)
    if len(policy) != len(baseline):
        raise ValueError(f"policy_correct has {len(policy)} scores, baseline_correct {len(baseline)}; accepted: pairs")
    for field, scores in (("policy_correct", policy), ("baseline_correct", baseline)):
        if not np.isin(scores, (0, 1)).all():
            value = scores[~np.isin(scores, (0, 1))][0]
            raise ValueError(f"{field} has the score {value}; accepted: 0 or 1, and paired_interval for dense scores")
    differences = policy - baseline
    leads = (differences if groups is None else _clusters(differences, groups)[0]).astype(int)
    total, lead = int(abs(leads).sum()), abs(int(leads.sum()))
    if lead == 0:
        return 1.0
    chances = np.ones(1)  # that so many of `total` fall to one side; of leads of 1 alone, binomial
    for size in abs(leads[leads != 0]):
        chances = (np.pad(chances, (0, size)) + np.pad(chances, (size, 0))) / 2
    return float(2 * chances[: (total - lead) // 2 + 1].sum())


def holm(p_values: ArrayLike) -> np.ndarray:
    """p-values adjusted for how many were looked at, float64 `(m,)` in the order given.

    Below 0.05 in the answer, any number of comparisons together claim a difference that is not there at most 5 % of the
    time, however they depend on each other: Holm 1979 (jstor.org/stable/4615733), never less powerful than Bonferroni.
    Raises ValueError for anything outside [0, 1].
    """
    p = _scores("p_values", p_values)
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"p_values has {p[(p < 0) | (p > 1)][0]}; accepted: 0 to 1")
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)  # the smallest is compared with all m, the next with m - 1 …
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(steps).clip(max=1.0)
    return adjusted


def minimum_detectable_difference(n: int, spread: float, level: float = 0.95, power: float = 0.8) -> float:
    """The true difference that an interval of `level` over `n` pairs leaves zero out of with probability `power`.

    In units of `spread`, the standard deviation of the paired differences (of prompts' means, where a prompt has many
    pictures: `n` is then the number of prompts). Of a paired t-test, zero left out on the side of the truth. Example:
    256 pairs of spread 0.1 tell 1.76 points of a score in [0, 1]. Raises ValueError for n < 2, a negative spread, and
    shares outside (0, 1).
    """
    from scipy.special import nctdtrinc, stdtrit

    if n < 2:
        raise ValueError(f"n is {n}; accepted: 2 or more, as a spread needs two")
    if not (np.isfinite(spread) and spread >= 0):
        raise ValueError(f"spread is {spread}; accepted: 0 or more")
    for field, value in (("level", level), ("power", power)):
        if not 0 < value < 1:
            raise ValueError(f"{field} is {value}; accepted: between 0 and 1")
    if power <= (1 - level) / 2:
        raise ValueError(f"power is {power}; accepted: more than {(1 - level) / 2:g}, which no difference at all has")
    critical = stdtrit(n - 1, (1 + level) / 2)
    shift = nctdtrinc(n - 1, 1 - power, critical)  # in standard errors: Student's t is noncentral by it
    return float(shift * spread / np.sqrt(n))
