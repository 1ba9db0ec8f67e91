"""Racing: whether a candidate is worth more pictures, by what it has shown on those it has. Knows only numbers.

A candidate starts on the first few of the search pictures and gets half as many again each time, as long as it would
still add to what the front commands were both its scores at the upper ends of their intervals. Differences to the
unmodified model are what counts, picture by picture; latency is predicted and has no noise. The intervals are of the
mean over all search pictures, of which those seen are a part: they close as the pictures run out.

Not covered: looking again and again, at two scores, makes errors more frequent than one interval has them, so nothing
here proves that a candidate is worse. It spends pictures well (`benchmarks/racing.py`); confirm proves.
"""

from collections.abc import Iterator

import numpy as np

from .front import Baseline, Point, hypervolume, non_dominated

REACH = 0.7  # standard errors from a mean to the upper end of its interval
TRIFLE = 0.003  # what adds a smaller share to the front's hypervolume is not worth pictures
PRIOR = 2.0  # pictures' worth of belief that a candidate's scores spread as those of others do
ROOM = 1.1  # times the slowest latency is where the front's space ends: louder text saves no time, and counts too


def rounds(first: int, images: int) -> Iterator[int]:
    """How many pictures a candidate has after each round: `first`, half as many again, and so on, at last all."""
    while first < images:
        yield first
        first += -(-first // 2)
    yield images


class Race:
    """The front so far, of candidates that have all `images`.

    Differences to the unmodified model are of alignment and quality, in shares of what counts as 100 points, `(n, 2)`;
    `slowest` is the latency of the unmodified model, at the most steps that a candidate may take.
    """

    def __init__(self, images: int, slowest: float):
        self.images = images
        self._unmodified = Baseline("unmodified", 0.0, 0.0, ROOM * slowest, scales=(1.0, 1.0))
        self._front: list[Point] = []
        self._volume = 0.0
        self._spread, self._finished = np.zeros(2), 0  # mean variance of differences, over so many candidates

    def finish(self, differences: np.ndarray, latency: float) -> None:
        """A candidate has all its pictures."""
        self._front = non_dominated([*self._front, _point(differences.mean(axis=0), latency)])
        self._volume = hypervolume(self._front, self._unmodified)
        self._finished += 1
        self._spread += (differences.var(axis=0) - self._spread) / self._finished

    def goes_on(self, differences: np.ndarray, latency: float) -> bool:
        """Whether a candidate may still add to the front, by its first pictures."""
        seen = len(differences)
        # few pictures may all be equal, which does not say that the others are
        variance = (seen * differences.var(axis=0) + PRIOR * self._spread) / (seen + PRIOR - 1)
        error = np.sqrt(variance / seen * (1 - seen / self.images))
        best = _point(differences.mean(axis=0) + REACH * error, latency)
        return hypervolume([*self._front, best], self._unmodified) - self._volume > TRIFLE * self._volume


def _point(means: np.ndarray, latency: float) -> Point:
    return Point("", float(means[0]), float(means[1]), latency)
