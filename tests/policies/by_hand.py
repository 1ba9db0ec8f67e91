"""What blocks do under a policy, by other means than the library's: hooks, and `forward` of single modules.

Nothing here looks at the library. Whatever is put on a model is gone at the end of its `with` block.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from .families import TEXT_TOKENS, Container, Family, Output


@contextmanager
def forward_as(module: nn.Module, by_hand: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `by_hand` meanwhile."""
    own = module.__dict__.get("forward")  # of an outer `forward_as`
    module.forward = by_hand
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def given(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a block by name."""
    return inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments


def identity(block: nn.Module, container: Container) -> Callable[..., Any]:
    """A block's forward that returns what it continues."""

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        before = tuple(given(block, args, kwargs)[name] for name in container.returns)
        return before if len(before) > 1 else before[0]

    return by_hand


def keeping_residuals(block: nn.Module, container: Container, kinds: list[str]) -> Callable[..., Any]:
    """A block's forward that computes, or adds the residuals it computed last, as `kinds` has it call by call."""
    original, calls, residuals = block.forward, iter(kinds), []

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        before = [given(block, args, kwargs)[name] for name in container.returns]
        if next(calls) == "compute":
            after = original(*args, **kwargs)
            streams = after if isinstance(after, tuple) else (after,)
            residuals[:] = [None if a is None else a - b for a, b in zip(streams, before, strict=True)]
            return after
        after = tuple(None if r is None else b + r for r, b in zip(residuals, before, strict=True))
        return after if len(after) > 1 else after[0]

    return by_hand


def heard(block: nn.Module, container: Container, scope: str, scale: float, text_rows: slice) -> Callable[..., Any]:
    """A block's forward whose incoming text is `scale` times as large."""
    original = block.forward

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        arguments = given(block, args, kwargs)
        arguments.pop("self")
        name = "hidden_states" if container.text == "joined" else "encoder_hidden_states"
        rows = text_rows if container.text == "joined" else slice(None)
        stream = arguments[name]
        seen = stream.clone()
        seen[:, rows] *= scale
        more = arguments.pop("args", ())  # what a block of Hunyuan takes and does not read
        after = original(*(arguments | {name: seen}).values(), *more)
        if scope == "propagate" or name not in container.returns:
            return after
        streams = list(after) if isinstance(after, tuple) else [after]
        at = container.returns.index(name)
        if streams[at] is not None:  # the running stream gets the update, unscaled itself
            streams[at] = stream + (streams[at] - seen)
        return tuple(streams) if len(streams) > 1 else streams[0]

    return by_hand


def scaled_output(where: Output, scale: float, text_rows: slice) -> Callable[..., torch.Tensor]:
    """A forward hook that scales what the module makes of the text."""

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        at = [slice(None)] * output.ndim
        if where.tokens is not None:
            at[where.tokens] = text_rows
        if where.columns is not None:
            at[-1] = slice(*where.columns)
        output[tuple(at)] *= scale
        return output

    return hook


@contextmanager
def softmax_written_out(
    monkeypatch: pytest.MonkeyPatch, attention: nn.Module, scale: float, text_rows: slice
) -> Iterator[None]:
    """In `attention`, text weighs `scale` times as much for image queries before the weights are normalised."""

    def attend(
        query: torch.Tensor,  # (batch, heads, queries, head dim)
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        logits = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            bias = attn_mask if attn_mask.dtype != torch.bool else torch.where(attn_mask, 0.0, -math.inf)
            logits = logits + bias
        weights = torch.exp(logits - logits.amax(-1, keepdim=True)) * louder(query, key)
        return weights / weights.sum(-1, keepdim=True) @ value

    def louder(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        text_keys, text_queries = torch.ones(key.shape[2]), torch.zeros(query.shape[2], 1)
        text_keys[text_rows], text_queries[text_rows] = scale, 1.0
        return torch.where(text_queries == 1, 1.0, text_keys.double())

    original = attention.forward

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
            return original(*args, **kwargs)

    with forward_as(attention, by_hand):
        yield


@contextmanager
def scaled_text(
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module,
    family: Family,
    index: int,
    operand: str,
    scope: str | None,
    scale: float,
) -> Iterator[None]:
    """The text of block `index` is scaled meanwhile; it is the whole of `family.inputs()`."""
    container, _ = family.slots[index]
    block = family.block(model, index)
    tokens = TEXT_TOKENS + family.registers
    text_rows = slice(-tokens, None) if family.text_last else slice(tokens)
    if operand == "input":
        assert scope is not None
        with forward_as(block, heard(block, container, scope, scale, text_rows)):
            yield
    elif operand == "logit":
        with softmax_written_out(monkeypatch, block.get_submodule(container.attention), scale, text_rows):
            yield
    else:
        where = container.key if operand == "key" else container.value
        handle = block.get_submodule(where.module).register_forward_hook(scaled_output(where, scale, text_rows))
        yield
        handle.remove()
