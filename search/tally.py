"""What the finished trials of a search come to: its front, its failures, and what they have cost."""

from optuna.trial import FrozenTrial, TrialState

from .front import Baseline, Point, extended, hypervolume
from .storage import point_of, stands


def drawn(trial: FrozenTrial, images: int) -> tuple[float, float, float]:
    """Pictures of a measured trial, their denoising steps, and those of them that earlier candidates had taken alike.

    `images` are those of a trial that does not say.
    """
    metrics = trial.user_attrs["metrics"]
    pictures = metrics.get("images", images)
    steps = pictures * trial.user_attrs["steps"]
    return pictures, steps, steps * metrics.get("steps_saved", 0.0)  # a run of before has none


class Tally:
    """Told of every trial once, when it has finished; a resume tells it of the stored ones."""

    def __init__(self, baseline: Baseline, images: int):
        """`images` are those that a trial had which does not say."""
        self.front: list[Point] = []  # of feasible trials, fastest first
        self.finished = self.failed = 0  # trials that count, and all that failed
        self._baseline, self._per_trial = baseline, images
        self._volume = self._images = self._seconds = self._steps = self._saved = 0.0

    def add(self, trial: FrozenTrial) -> None:
        complete = trial.state == TrialState.COMPLETE
        self.failed += not complete
        self.finished += complete or "reason" in trial.user_attrs  # not one that a kill has ended
        if not complete:
            return
        if "same_as" not in trial.user_attrs:
            metrics = trial.user_attrs["metrics"]
            images, steps, saved = drawn(trial, self._per_trial)
            self._images += images
            self._steps += steps
            self._saved += saved
            self._seconds += metrics["generate_seconds"] + metrics["score_seconds"]
        if stands(trial):
            before, self.front = self.front, extended(self.front, point_of(trial))
            if self.front is not before:
                self._volume = hypervolume(self.front, self._baseline)

    @property
    def standing(self) -> dict[str, float]:
        """The best of each objective, which is on the front, and how large that is; empty where none is feasible."""
        if not self.front:
            return {}
        return {
            "best_alignment": max(p.alignment for p in self.front),
            "best_quality": max(p.quality for p in self.front),
            "best_speedup": self._baseline.latency / self.front[0].latency,
            "hypervolume": self._volume,
            "front": float(len(self.front)),
            "failed": float(self.failed),
        }

    @property
    def spent(self) -> dict[str, float]:
        """Pictures made and seconds of workers in the trials that were measured.

        `steps_saved` is the share of their denoising steps that earlier candidates had taken alike.
        """
        saved = self._saved / max(1, self._steps)
        return {"images": self._images, "worker_seconds": self._seconds, "steps_saved": saved}
