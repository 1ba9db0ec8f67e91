"""The batch of one transformer call, as text scales see it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .policy import Branch


@dataclass(frozen=True)
class Rows:
    """`batch` rows; when `guided`, the first half is unconditional, else every row is conditional."""

    batch: int
    guided: bool
    device: torch.device
    dtype: torch.dtype  # of the latents: scales have float64 when they do, and float32 otherwise

    def factor(self, scales: Sequence[tuple[Branch, float]]) -> torch.Tensor | None:
        """What multiplies the text of each row: `(1, 1, 1)`, or `(batch, 1, 1)` if rows differ; None for nothing."""
        by_branch: dict[Branch, float] = dict(scales)
        unconditional = self.batch // 2 if self.guided else 0
        if "both" in by_branch:  # then it is the only one: two would contradict each other
            rows = [by_branch["both"]]
        else:
            rows = [by_branch.get("uncond", 1.0)] * unconditional
            rows += [by_branch.get("cond", 1.0)] * (self.batch - unconditional)
        if all(scale == 1.0 for scale in rows):
            return None
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.tensor(rows, dtype=dtype, device=self.device)[:, None, None]
