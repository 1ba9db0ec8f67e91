"""The attention in which the image hears the text, with the text made louder inside it.

Whatever the processor, the text stands at known places among the keys of one call of `scaled_dot_product_attention`;
scaling there serves every architecture, and what is rotated (RoPE) or normed before is scaled as if right after it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .error import PolicyError
from .logits import weighted_attention
from .stand_in import StandIn


def scale_rows(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`x * factor` in x's dtype, rounded once; where the factor is 0 the result is 0 even for an infinite x.

    x `(batch, ...)`; factor float32 or float64, broadcastable to x.
    """
    factor = factor.to(x.device)
    return torch.where(factor == 0, 0.0, x * factor).to(x.dtype)


class ScaledAttention(StandIn):
    """Stands in for a block's attention while the block computes.

    Each factor is None or `(batch or 1, text tokens or 1, 1)`: `key` scales text keys, `value` text values, `logit`
    the weight of text keys for image queries before the softmax is normalised. Text queries see the same keys and
    values, without the logit factor, as in the softmax they would have had.
    """

    def __init__(
        self,
        attention: nn.Module,
        text_keys: Literal["first", "last", "all"],
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        logit: torch.Tensor | None,
    ) -> None:
        super().__init__(attention)
        self.text_keys = text_keys
        self.key = key
        self.value = value
        self.logit = logit
        self.text_tokens = 0  # of the call; set by the block's stand-in
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls = 0
        with _Traced(self) if torch.compiler.is_compiling() else _REDIRECT.to(self.attend):
            out = self.original(*args, **kwargs)
        if self.calls != 1:
            raise PolicyError(
                "scale_text of key, value or logit needs an attention that calls scaled_dot_product_attention once on "
                "all tokens: use attention backend 'native' and the model's own attention processors."
            )
        return out

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """In place of `scaled_dot_product_attention`; all `(batch, heads, tokens, head dim)`.

        Calls on other keys than text and image, as those of an IP adapter, are left alone.
        """
        options: dict[str, Any] = {
            "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa
        }  # fmt: skip
        total = key.shape[2]
        if total != (self.text_tokens if self.text_keys == "all" else query.shape[2]):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        self.calls = self.calls + 1
        start = total - self.text_tokens if self.text_keys == "last" else 0
        text = slice(start, start + self.text_tokens)
        if value is key:  # what scales the one in place must not reach the other
            value = value.clone()
        key, value = _with_scaled(key, text, self.key), _with_scaled(value, text, self.value)
        if self.logit is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        image = slice(0, start) if self.text_keys == "last" else slice(text.stop, total)
        factor = self.logit.to(query.device)
        learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if attn_mask is None and factor.shape[1] == 1 and not (learns or dropout_p or is_causal or enable_gqa):
            return weighted_attention(query, key, value, text, image, factor, scale)
        # One bias row serves every image query, so without a mask no (queries x keys) one is built, and text queries go
        # without.
        weight = factor.log().to(query.dtype).transpose(1, 2).unsqueeze(1)  # (rows, 1, 1, text)
        weight = weight.expand(-1, -1, -1, self.text_tokens)
        bias = F.pad(weight, (start, total - text.stop))  # (rows, 1, 1, keys)
        asking, mask = query[:, :, image], _biased(_rows_of(attn_mask, image), bias)
        mask = mask.expand(asking.shape[0], -1, asking.shape[2], -1)
        of_image = F.scaled_dot_product_attention(asking, key, value, mask, **options)
        mask = _rows_of(attn_mask, text)
        of_text = F.scaled_dot_product_attention(query[:, :, text], key, value, mask, **options)
        return torch.cat([of_image, of_text] if self.text_keys == "last" else [of_text, of_image], dim=2)


class _Redirect:
    """Hands a thread's calls of `scaled_dot_product_attention`, where it asks for that, to another function.

    Processors look the function up in `torch.nn.functional`, where it is replaced while any thread asks. A mode of
    torch's would need no replacing, but be asked before each of the 80 operations of an attention, which eager runs of
    many small blocks feel.
    """

    def __init__(self) -> None:
        self._threads = threading.local()  # `.attend`: where this thread's calls go, if not None
        self._lock = threading.Lock()
        self._asking = 0  # threads
        self._replaced: Callable[..., torch.Tensor] = F.scaled_dot_product_attention

    @contextmanager
    def to(self, attend: Callable[..., torch.Tensor]) -> Iterator[None]:
        with self._lock:
            if self._asking == 0:
                self._replaced, F.scaled_dot_product_attention = F.scaled_dot_product_attention, self._attend
            self._asking += 1
        self._threads.attend = attend
        try:
            yield
        finally:
            self._threads.attend = None
            with self._lock:
                self._asking -= 1
                if self._asking == 0:
                    F.scaled_dot_product_attention = self._replaced

    def _attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        attend = getattr(self._threads, "attend", None)
        if attend is None:
            return self._replaced(*args, **kwargs)
        self._threads.attend = None  # what it calls itself is not handed to it
        try:
            return attend(*args, **kwargs)
        finally:
            self._threads.attend = attend


_REDIRECT = _Redirect()


class _Traced(TorchFunctionMode):
    """The same while Dynamo traces, which follows a mode, and could not guard what is replaced and put back."""

    def __init__(self, scaled: ScaledAttention) -> None:
        super().__init__()
        self.scaled = scaled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.scaled.attend(*args, **(kwargs or {}))
        if func is torch.Tensor.unflatten:
            # Written in Python, it calls super(): Dynamo knows the method by name, but follows it into that call when
            # it comes by way of a mode, and torch 2.11's fails there. This is the same without.
            return torch.unflatten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _with_scaled(x: torch.Tensor, text: slice, factor: torch.Tensor | None) -> torch.Tensor:
    """Keys or values with those of the text scaled: in place, for they are the attention's own and read once."""
    if factor is None:
        return x
    scaled = scale_rows(x[:, :, text], factor.unsqueeze(1))
    if (torch.is_grad_enabled() and x.requires_grad) or 0 in x.stride():  # expanded: rows share their memory
        return torch.cat([x[:, :, : text.start], scaled, x[:, :, text.stop :]], dim=2)
    x[:, :, text].copy_(scaled)
    return x


def _rows_of(mask: torch.Tensor | None, queries: slice) -> torch.Tensor | None:
    """The part of an attention mask `(..., queries or 1, keys)` for some of the queries."""
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., queries, :]


def _biased(mask: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    """The mask, boolean or added, with `bias` added to what it lets through."""
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias
