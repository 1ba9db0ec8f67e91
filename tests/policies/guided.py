"""As much of a pipeline as guidance takes, around the transformer of any family."""

import torch
from blocktune.policies.architectures import ARCHITECTURES
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from .families import STEPS, Family


class Pipeline:
    """Guides in one call for both halves, or in a call for each, as pipelines of the transformer do."""

    def __init__(self, transformer: nn.Module, guides: bool = True) -> None:
        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.calls = ARCHITECTURES[type(transformer).__name__].guidance == "calls"
        self.guides = guides

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guides

    def __call__(self, family: Family, pictures: int = 1) -> list[torch.Tensor]:
        """The transformer's output at each step: of `2 * pictures` rows the unconditional ones first."""
        self.scheduler.set_timesteps(STEPS)
        outputs = []
        for step, t in enumerate(self.scheduler.timesteps):
            if self.calls or not self.guides:
                rows = [family.forward(self.transformer, batch=pictures, seed=step)]
                if self.guides:
                    rows.insert(0, family.forward(self.transformer, batch=pictures, seed=50 + step))
                outputs.append(torch.cat(rows))
            else:
                outputs.append(family.forward(self.transformer, batch=2 * pictures, seed=step))
            self.scheduler.step(torch.zeros(1), t, torch.zeros(1))
        return outputs
