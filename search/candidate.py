"""A candidate: what a search proposes and a worker measures. Knows nothing of either."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..policies import BlockPolicy, Plan


@dataclass(frozen=True)
class Candidate:
    """A policy, obeyed for so many steps, at the model's own scale of guidance or another."""

    policy: BlockPolicy
    steps: int
    guidance_scale: float | None = None  # None is generation.guidance_scale

    @property
    def key(self) -> str:
        """Its name in files and studies: equal for two encodings of the same policy, steps and guidance."""
        guidance = "" if self.guidance_scale is None else f"-{self.guidance_scale}"
        return f"{self.policy.digest}-{self.steps}{guidance}"

    @cached_property
    def behaviour(self) -> str:
        """Equal for two that do the same at each of their steps, where another number of steps may tell them apart.

        In four steps, whoever reuses from the second on does it as often with `every` 4 as with 6.
        """
        plan = Plan.compile(self.policy, self.steps)
        told = {id(step): step for row in plan.steps for step in row}  # which blocks of a band share
        numbers: dict[str, int] = {}  # of what one may do at a step
        which = {key: numbers.setdefault(repr(step), len(numbers)) for key, step in told.items()}
        rows = [[which[id(step)] for step in row] for row in plan.steps]
        does = repr((self.policy.model, plan.guided, rows, list(numbers), self.guidance_scale))
        return hashlib.sha256(does.encode()).hexdigest()

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `generation` that it sets."""
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {"num_inference_steps": self.steps} | guidance
