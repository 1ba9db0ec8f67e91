"""Whether a policy scores differently from the unmodified model: paired bootstrap intervals.

Scores are paired: the same prompt and seed stand at the same position of both arrays. Pictures of one prompt are alike,
so whole prompts are resampled, not pictures. For `m` comparisons at once, ask for `level=1 - 0.05 / m` (Bonferroni).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_CHUNK = 1 << 18  # indices drawn at a time, so that memory does not grow with the number of resamples


@dataclass(frozen=True)
class Interval:
    """Mean score of the policy and of the baseline, their difference with its interval at `level`, and `n` pictures."""

    value: float
    baseline: float
    delta: float
    low: float
    high: float
    level: float
    n: int

    @property
    def points(self) -> str:
        """The difference in points, hundredths of the score: `+1.4 [-3.0, +5.8]`."""
        return f"{100 * self.delta:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def paired_interval(
    policy_scores: ArrayLike,
    baseline_scores: ArrayLike,
    groups: Sequence | np.ndarray | None = None,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """The mean difference policy minus baseline, with a bootstrap interval over groups.

    Scores are `(n,)` each, `groups` `(n,)` ids of which equal ones stay together (the prompt); without them every
    picture is its own group. Percentile interval of the resampled mean over pictures, its tails widened for few groups
    as Hesterberg 2015 (doi:10.1080/00031305.2015.1089789) does: for normal data the width is then that of Student's t,
    where the plain percentile and BCa intervals are too narrow. The same input and seed give the same answer.

    Where few pictures differ the interval is too narrow: with 6 unequal pairs of binary scores in 100 a nominal 95 %
    held the truth 92 % of the time, with 12 in 200 94 %. Equal scores everywhere give [0, 0], which proves nothing.
    Raises ValueError for scores that are not finite, unequal lengths, and fewer than two groups.
    """
    policy, baseline = _scores("policy_scores", policy_scores), _scores("baseline_scores", baseline_scores)
    if len(policy) != len(baseline):
        raise ValueError(f"policy_scores has {len(policy)} scores, baseline_scores {len(baseline)}; accepted: pairs")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; accepted: between 0 and 1, as 0.95")
    if resamples * (1 - level) < 2:
        raise ValueError(f"resamples is {resamples}, too few for level {level}; accepted: 2 / (1 - level) or more")
    sums, counts = _clusters(policy - baseline, groups)
    delta = float(sums.sum() / counts.sum())
    low, high = _bootstrap(sums, counts, level, resamples, seed)
    # rounding must not put the estimate a bit outside an interval of no width
    low, high = min(low, delta), max(high, delta)
    return Interval(float(policy.mean()), float(baseline.mean()), delta, low, high, level, len(policy))


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


def _bootstrap(sums: np.ndarray, counts: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    from scipy.special import ndtr, stdtrit

    n = len(sums)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, _CHUNK // n)
    for start in range(0, resamples, chunk):
        drawn = rng.integers(0, n, (min(chunk, resamples - start), n))  # (resamples of this chunk, groups)
        means[start : start + chunk] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = ndtr(-np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + level) / 2))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
