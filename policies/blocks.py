"""What stands in for a block while the transformer's forward runs: one thin wrapper per kind of action.

A wrapper is called as the block is and returns what the block returns, in the block's own order.
"""

from typing import Any

import torch
from torch import nn

from .attention import ScaledAttention, scale_rows
from .layout import Layout, Stream
from .memory import Memory
from .stand_in import StandIn


class _BlockStandIn(StandIn):
    def __init__(self, block: nn.Module, layout: Layout) -> None:
        super().__init__(block)
        self.layout = layout
        self.called = False

    def stands_in_for(self, block: nn.Module) -> bool:
        """Whether it was made for this very block, as it is now."""
        return self.original is block


class SkippedBlock(_BlockStandIn):
    """Returns its inputs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return self.layout.returned(*self.layout.inputs(args, kwargs))


class ReusedBlock(_BlockStandIn):
    """Adds the residual in `memory`; `stream`, if any, scales the running text in front of it."""

    def __init__(self, block: nn.Module, layout: Layout, memory: Memory, stream: torch.Tensor | None) -> None:
        super().__init__(block, layout)
        self.memory = memory
        self.stream = stream

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        text, image = self.layout.inputs(args, kwargs)
        text_residual, image_residual = self.memory.recall(len(image), image.device)
        if text is not None and self.stream is not None:
            text = scale_rows(text, self.stream)
        text = None if text is None or text_residual is None else text + text_residual
        return self.layout.returned(text, image + image_residual)


class ComputedBlock(_BlockStandIn):
    """Computes: with the text scaled, keeping its residual, or both.

    `stream` scales the running text in front of the block, `local` what this block alone sees of it; both
    `(batch or 1, tokens or 1, 1)`. `attention` stands in for the block's attribute of the name `attends`. `memory`
    takes the residual of the block, which is counted from the text that it saw, or, of a run, what its first block
    `begins` with and its last one `ends` with.
    """

    def __init__(
        self,
        block: nn.Module,
        layout: Layout,
        memory: Memory | None,
        stream: torch.Tensor | None,
        local: torch.Tensor | None,
        attends: str,
        attention: ScaledAttention | None,
        begins: bool = True,
        ends: bool = True,
    ) -> None:
        super().__init__(block, layout)
        self.memory = memory
        self.begins = begins
        self.ends = ends
        self.stream = stream
        self.local = local
        self.attends = attends
        # in a tuple: as a child it would be moved, cast and offloaded along with the block that holds the real one
        self.attention = () if attention is None else (attention,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        layout = self.layout
        text, image = layout.inputs(args, kwargs)
        seen = text
        if text is not None:
            text = text if self.stream is None else scale_rows(text, self.stream)
            seen = text if self.local is None else scale_rows(text, self.local)
        if self.memory is not None and self.begins:
            self.memory.begin(seen if self.ends else text, image)
        if seen is None or (self.stream is None and self.local is None):
            returned = self.compute(seen, *args, **kwargs)
        else:
            returned = layout.call(lambda *a, **k: self.compute(seen, *a, **k), args, kwargs, seen)
        if self.memory is None and self.local is None:
            return returned
        text_out, image_out = layout.outputs(returned)
        alone = self.begins and self.ends
        if self.memory is not None and alone:
            self.memory.keep(text_out, image_out)
        if self.local is not None and text_out is not None and text is not None and seen is not None:
            unscaled = self.local.to(text.device) == 1
            text_out = torch.where(unscaled, text_out, text + (text_out - seen))
            returned = layout.returned(text_out, image_out)
        if self.memory is not None and self.ends and not alone:
            self.memory.keep(text_out, image_out)
        return returned

    def stands_in_for(self, block: nn.Module) -> bool:
        return self.original is block and all(a.original is getattr(block, self.attends) for a in self.attention)

    def compute(self, seen: Stream, *args: Any, **kwargs: Any) -> Any:
        """The block, with its attention swapped if it is to be scaled."""
        if not self.attention:
            return self.original(*args, **kwargs)
        (scaled,) = self.attention
        assert seen is not None
        scaled.text_tokens = seen.shape[1]
        setattr(self.original, self.attends, scaled)
        try:
            return self.original(*args, **kwargs)
        finally:
            setattr(self.original, self.attends, scaled.original)
