"""What stands in for a block while the transformer's forward runs: one thin wrapper per kind of action.

A wrapper is called as the block is and returns what the block returns, in the block's own order.
"""

from typing import Any

import torch
from torch import nn

from .architectures import Architecture
from .attention import ScaledJointAttention, scale_rows

Stream = torch.Tensor | None  # (batch, tokens, dim); None where a block does not produce the stream


class Memory:
    """The residual a block computed last: (text, image), output minus input."""

    def __init__(self) -> None:
        self.residual: tuple[Stream, torch.Tensor] | None = None


class _StandIn(nn.Module):
    def __init__(self, block: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.block = block
        self.architecture = architecture

    def __getattr__(self, name: str) -> Any:
        """The forward of a transformer reads attributes of its blocks (SD3: `context_pre_only`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def outputs(self, text: Stream, image: torch.Tensor) -> tuple[Stream, Stream]:
        return (text, image) if self.architecture.text_first else (image, text)


def _streams(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image out of a block's arguments, however they are passed."""
    image, text = args[:2] if args else (kwargs["hidden_states"], kwargs["encoder_hidden_states"])
    return text, image


class SkippedBlock(_StandIn):
    """Returns its inputs."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Stream, Stream]:
        return self.outputs(*_streams(args, kwargs))


class ReusedBlock(_StandIn):
    """Adds the residual in `memory`; `stream`, if any, scales the running text in front of it."""

    def __init__(
        self, block: nn.Module, architecture: Architecture, memory: Memory, stream: torch.Tensor | None
    ) -> None:
        super().__init__(block, architecture)
        self.memory = memory
        self.stream = stream

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Stream, Stream]:
        text, image = _streams(args, kwargs)
        assert self.memory.residual is not None  # the plan reuses only what an earlier step kept
        text_residual, image_residual = self.memory.residual
        text = text if self.stream is None else scale_rows(text, self.stream)
        return self.outputs(None if text_residual is None else text + text_residual, image + image_residual)


class ComputedBlock(_StandIn):
    """Computes: with the text scaled, keeping its residual, or both.

    `stream` scales the running text in front of the block, `local` what this block alone sees of it; both
    `(batch or 1, tokens or 1, 1)`. `attention` stands in for the processor of the joint attention. `memory` takes the
    residual, which is counted from the text that the block saw.
    """

    def __init__(
        self,
        block: nn.Module,
        architecture: Architecture,
        memory: Memory | None,
        stream: torch.Tensor | None,
        local: torch.Tensor | None,
        attention: ScaledJointAttention | None,
    ) -> None:
        super().__init__(block, architecture)
        self.memory = memory
        self.stream = stream
        self.local = local
        self.attention = attention

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Stream, Stream]:
        text, image = _streams(args, kwargs)
        if self.stream is not None:
            text = scale_rows(text, self.stream)
        seen = text if self.local is None else scale_rows(text, self.local)
        if args:
            out = self.compute(image, seen, *args[2:], **kwargs)
        else:
            out = self.compute(**{**kwargs, "encoder_hidden_states": seen})
        text_out, image_out = out if self.architecture.text_first else out[::-1]

        if self.memory is not None:
            self.memory.residual = (None if text_out is None else text_out - seen, image_out - image)
        if self.local is not None and text_out is not None:
            local = self.local.to(text.device)
            text_out = torch.where(local == 1, text_out, text + (text_out - seen))
        return self.outputs(text_out, image_out)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """The block, with the processor swapped in if there is one."""
        if self.attention is None:
            return self.block(*args, **kwargs)
        joint = getattr(self.block, self.architecture.attention)
        processor = joint.processor
        joint.processor = self.attention
        try:
            return self.block(*args, **kwargs)
        finally:
            joint.processor = processor
