"""Which step of which run a transformer call is, read off the scheduler without a device synchronisation."""

from dataclasses import dataclass
from typing import Any

from .error import PolicyError
from .policy import BlockPolicy


@dataclass(frozen=True)
class Tick:
    """One reading of the scheduler."""

    step: int
    num_steps: int
    fresh: bool  # the scheduler has not stepped since its schedule was set
    schedule: Any  # the very object; `set_timesteps` makes a new one

    def begins_run_after(self, last: "Tick | None") -> bool:
        """Whether a run (a pipeline call) has begun since `last`: the schedule was set anew, or the step went back."""
        if last is None or self.step < last.step or self.num_steps != last.num_steps:
            return True
        return self.fresh and (not last.fresh or self.step != last.step or self.schedule is not last.schedule)


def has_steps(scheduler: Any) -> bool:
    """Whether the scheduler tells the step it is at."""
    return hasattr(scheduler, "step_index") and hasattr(scheduler, "timesteps")


def read(scheduler: Any) -> Tick:
    """The scheduler's own index and the length of its schedule; a second-order scheduler counts evaluations.

    Raises PolicyError when the schedule is not set or is over.
    """
    schedule = scheduler.timesteps
    num_steps = 0 if schedule is None else len(schedule)
    step = scheduler.step_index
    fresh = step is None
    if fresh:
        step = getattr(scheduler, "begin_index", None) or 0
    if not 0 <= step < num_steps:
        raise PolicyError(
            f"{type(scheduler).__name__} is at step {step} of a schedule of {num_steps}; "
            "call its set_timesteps before the transformer."
        )
    return Tick(step, num_steps, fresh, schedule)


def refuse_without_steps(policy: BlockPolicy, scheduler: Any) -> None:
    """PolicyError where a rule asks for the step of the run and the scheduler does not tell it."""
    asks = [f"rules[{i}] has a window or reuses" for i, rule in enumerate(policy.rules) if rule.needs_step]
    if policy.guides_in_part:
        asks.append(f"guidance_window is {list(policy.guidance_window)}")
    if asks and not has_steps(scheduler):
        lacks = "no scheduler was given" if scheduler is None else f"{type(scheduler).__name__} has no step_index"
        raise PolicyError(f"{asks[0]}, which takes the step of the run, but {lacks}.")
