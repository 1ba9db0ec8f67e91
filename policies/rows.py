"""The batch of one transformer call: the rows as text scales see them, and the conditional half alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .policy import Branch, ScaleText, Tokens
from .tokens import Texts


@dataclass(frozen=True)
class Rows:
    """`batch` rows; when `guided`, the first half is unconditional, else every row is conditional."""

    batch: int
    guided: bool
    device: torch.device
    dtype: torch.dtype  # of the latents: scales have float64 when they do, and float32 otherwise
    text_tokens: int | None  # text tokens in front of a joined stream
    texts: Texts | None = None  # the prompts behind the rows

    @torch.inference_mode(False)  # a factor outlives the run: training may meet it after a run in inference mode
    def factor(self, scales: Sequence[tuple[Branch, ScaleText]]) -> torch.Tensor | None:
        """What multiplies the text of each row, None for nothing.

        `(1, 1, 1)`, or `(batch, 1, 1)` if rows differ, or `(batch, tokens, 1)` if tokens do.
        """
        by_branch: dict[Branch, ScaleText] = dict(scales)
        unconditional = self.batch // 2 if self.guided else 0
        if "both" in by_branch:  # then it is the only one: two would contradict each other
            rows: list[ScaleText | None] = [by_branch["both"]] * (1 if self.texts is None else self.batch)
        else:
            rows = [by_branch.get("uncond")] * unconditional
            rows += [by_branch.get("cond")] * (self.batch - unconditional)
        values = [1.0 if action is None else action.scale for action in rows]
        if all(value == 1.0 for value in values):
            return None
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        factor = torch.tensor(values, dtype=dtype, device=self.device)[:, None, None]
        tokens: list[Tokens] = ["all" if action is None else action.tokens for action in rows]
        if self.texts is None or all(which == "all" for which in tokens):
            return factor
        marks = torch.stack([self.texts.mark(row, which) for row, which in enumerate(tokens)])  # (batch, tokens)
        return torch.where(marks.to(self.device)[..., None], factor, 1.0)


def conditional(given: Any, rows: int) -> Any:
    """The later half of each tensor `(rows, ...)`, wherever it lies in a call's arguments; all others as they are."""
    return tree_map_only(torch.Tensor, lambda t: t[rows // 2 :] if t.ndim and len(t) == rows else t, given)


def for_both(output: Any) -> Any:
    """What a transformer returned for one half of guidance, given for the other as well."""
    return tree_map_only(torch.Tensor, lambda t: torch.cat([t, t]), output)
