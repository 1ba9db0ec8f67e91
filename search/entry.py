"""A candidate in the race: its trial, and what its pictures so far have scored."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import optuna

from .candidate import Candidate
from .config import Constraints
from .scoring import Measurement

Scores = Mapping[str, np.ndarray]  # per picture (n,) by evaluator


@dataclass
class Entry:
    """`rounds` tells how many pictures it has after each round. `before` are the unmodified model's scores."""

    trial: optuna.Trial
    chosen: Candidate
    latency: float  # predicted seconds of a batch
    rounds: Iterator[int]
    races: bool  # whether it may be dropped after one
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    images: int = 0
    generate_seconds: float = 0.0
    score_seconds: float = 0.0
    steps_saved: float = 0.0  # share of the steps of all pictures so far
    cache_bytes: int = 0  # that residuals took at most, in a batch

    def add(self, measured: Measurement) -> None:
        parts = measured.scores.items()
        self.scores = {k: np.concatenate([self.scores[k], v]) if k in self.scores else v for k, v in parts}
        new = len(measured.images)
        self.steps_saved = (self.images * self.steps_saved + new * measured.steps_saved) / (self.images + new)
        self.images += new
        self.generate_seconds += measured.generate_seconds
        self.score_seconds += measured.score_seconds
        self.cache_bytes = max(self.cache_bytes, measured.cache_bytes)

    def not_finite(self) -> str | None:
        """What is wrong with the scores."""
        names = [name for name, values in self.scores.items() if not np.isfinite(values).all()]
        return f"{', '.join(names)} gave scores that are not finite" if names else None

    def means(self, before: Scores) -> dict[str, float]:
        """What all pictures score, or would as far as those seen tell.

        One that was dropped looked bad, so that luck, which raises the best of many, does not make its estimate good.
        """
        seen = self.images
        return {name: float(before[name].mean() + (v - before[name][:seen]).mean()) for name, v in self.scores.items()}

    def certain(self, constraints: Constraints, before: Scores, latency: float) -> dict[str, float]:
        """By how much it breaks what more pictures would not mend; `latency` is a share of the unmodified model's."""
        insane = float((self.scores["sane"] < 1).sum() - (before["sane"][: self.images] < 1).sum())
        late = {} if constraints.max_latency is None else {"max_latency": latency - constraints.max_latency}
        most = constraints.max_cache_gib
        full = {} if most is None else {"max_cache_gib": self.cache_bytes / 2**30 - most}
        return {"insane_pictures": insane} | late | full

    def excesses(self, constraints: Constraints, before: Scores, latency: float) -> dict[str, float]:
        """By how much it breaks each constraint; at or below zero it keeps it."""
        means, wanted = self.means(before), constraints.min_fidelity
        return self.certain(constraints, before, latency) | {
            f"min_fidelity {name}": least - means[name] for name, least in wanted.items()
        }
