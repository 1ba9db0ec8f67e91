"""A candidate: what a search proposes and a worker measures. Knows nothing of either."""

from dataclasses import dataclass
from typing import Any

from ..policies import BlockPolicy


@dataclass(frozen=True)
class Candidate:
    """A policy, obeyed for so many steps, at the model's own scale of guidance or another."""

    policy: BlockPolicy
    steps: int
    guidance_scale: float | None = None  # None is generation.guidance_scale

    @property
    def key(self) -> str:
        """Equal for two encodings of the same behaviour."""
        guidance = "" if self.guidance_scale is None else f"-{self.guidance_scale}"
        return f"{self.policy.digest}-{self.steps}{guidance}"

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `generation` that it sets."""
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {"num_inference_steps": self.steps} | guidance
