"""A block's text and image: out of its arguments, back into a call, and into what it returns."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from .architectures import Streams

Stream: TypeAlias = torch.Tensor | None  # (batch, tokens, dim); None where a block does not take or return the stream


@dataclass(frozen=True)
class Layout:
    """How one kind of block holds its streams.

    Of "joined" blocks the first `text_tokens` are text; where that is None, and of "mixed" blocks always, the whole
    tensor counts as image.
    """

    streams: Streams
    text_tokens: int | None = None

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Stream, torch.Tensor]:
        """Text and image that a block is called with, however they are passed."""
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        if self.streams in ("joined", "mixed"):
            return self._part(hidden)
        return args[1] if len(args) > 1 else kwargs["encoder_hidden_states"], hidden

    def call(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], text: torch.Tensor) -> Any:
        """What the block returns when `text` takes the place of the text it is called with."""
        if self.streams == "joined":
            hidden = torch.cat([text, self.inputs(args, kwargs)[1]], dim=1)
            return block(hidden, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": hidden})
        if len(args) > 1:
            return block(args[0], text, *args[2:], **kwargs)
        return block(*args, **{**kwargs, "encoder_hidden_states": text})

    def outputs(self, returned: Any) -> tuple[Stream, torch.Tensor]:
        """Text and image out of what a block returned."""
        if self.streams == "text, image":
            return returned
        if self.streams == "image, text":
            return returned[::-1]
        return self._part(returned) if self.streams == "joined" else (None, returned)

    def returned(self, text: Stream, image: torch.Tensor) -> Any:
        """What a block with these outputs returns."""
        if self.streams == "text, image":
            return text, image
        if self.streams == "image, text":
            return image, text
        return image if self.streams in ("image", "mixed") or text is None else torch.cat([text, image], dim=1)

    def _part(self, hidden: torch.Tensor) -> tuple[Stream, torch.Tensor]:
        n = self.text_tokens
        return (None, hidden) if n is None or self.streams == "mixed" else (hidden[:, :n], hidden[:, n:])
