"""What blocks do under a policy, by other means than the library's: hooks, and `forward` of single modules.

Nothing here looks at the library. Whatever is put on a model is gone at the end of its `with` block.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from .families import Container, Family, Output

BRANCHES = ("cond", "uncond")  # in the order in which pipelines call them


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
    """A block's forward that computes, or adds the residuals it computed last, as `kinds` has it call by call.

    With "forecast" it adds what the line through the last two says of the call.
    """
    original, calls, kept = block.forward, enumerate(kinds), []

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        before = [given(block, args, kwargs)[name] for name in container.returns]
        call, kind = next(calls)
        if kind == "compute":
            after = original(*args, **kwargs)
            streams = after if isinstance(after, tuple) else (after,)
            kept.append((call, [None if a is None else a - b for a, b in zip(streams, before, strict=True)]))
            return after
        last, residuals = kept[-1]
        if kind == "forecast":
            first, older = kept[-2]
            residuals = [
                None if r is None or o is None else r + (r - o) * (call - last) / (last - first)
                for r, o in zip(residuals, older, strict=True)
            ]
        after = tuple(None if r is None else b + r for r, b in zip(residuals, before, strict=True))
        return after if len(after) > 1 else after[0]

    return by_hand


@contextmanager
def changed(pipe: Any, guided: bool, change: Callable[[int, str], AbstractContextManager]) -> Iterator[None]:
    """Each call of the transformer runs inside `change(step, branch)`; when `guided`, there are two at each step."""
    original, calls = pipe.transformer.forward, itertools.count()

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        step, call = divmod(next(calls), 1 + guided)
        with change(step, BRANCHES[call]):
            return original(*args, **kwargs)

    with forward_as(pipe.transformer, by_hand):
        yield


# --- text --------------------------------------------------------------------------------------------------------


@contextmanager
def scaled_text(
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module,
    family: Family,
    index: int,
    operand: str,
    scope: str | None,
    factors: torch.Tensor,
) -> Iterator[None]:
    """Block `index` hears each token of its text as loud as `factors` (batch or 1, text tokens) has it."""
    container, _ = family.slots[index]
    block = family.block(model, index)

    def of_all(tokens: int) -> torch.Tensor:
        """(batch or 1, tokens): the factors of text and image in the order of the joint attention."""
        image = torch.ones(factors.shape[0], tokens - factors.shape[1])
        return torch.cat([image, factors] if family.text_last else [factors, image], dim=1)

    if operand == "input":
        with forward_as(block, hearing(block, container, scope == "propagate", factors, of_all)):
            yield
    elif operand == "logit":
        tokens = factors.shape[1]
        text = slice(-tokens, None) if family.text_last else slice(tokens)
        with softmax_written_out(monkeypatch, block.get_submodule(container.attention), of_all, text):
            yield
    else:
        where = container.key if operand == "key" else container.value
        hook = scaling_output(where, of_all if where.image_too else lambda _: factors)
        with block.get_submodule(where.module).register_forward_hook(hook):
            yield


def hearing(
    block: nn.Module,
    container: Container,
    propagates: bool,
    factors: torch.Tensor,
    of_all: Callable[[int], torch.Tensor],
) -> Callable[..., Any]:
    """A block's forward whose incoming text is scaled."""
    original = block.forward
    name = "hidden_states" if container.text == "joined" else "encoder_hidden_states"

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        arguments = given(block, args, kwargs)
        arguments.pop("self")
        more = arguments.pop("args", ())  # what a block of Hunyuan takes and does not read
        stream = arguments[name]
        scales = of_all(stream.shape[1]) if container.text == "joined" else factors
        seen = stream * scales[..., None].to(stream.dtype)
        after = original(*(arguments | {name: seen}).values(), *more)
        if propagates or name not in container.returns:
            return after
        streams = list(after) if isinstance(after, tuple) else [after]
        at = container.returns.index(name)
        if streams[at] is not None:  # the running stream gets the update, unscaled itself
            streams[at] = stream + (streams[at] - seen)
        return tuple(streams) if len(streams) > 1 else streams[0]

    return by_hand


def scaling_output(where: Output, factors_of: Callable[[int], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A forward hook that scales what the module makes of the text."""

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        factors = factors_of(output.shape[where.tokens])
        shape = [1] * output.ndim
        shape[0], shape[where.tokens] = factors.shape
        scaled = output * factors.view(shape).to(output.dtype)
        if where.columns is None:
            return scaled
        start, stop = where.columns
        return torch.cat([output[..., :start], scaled[..., start:stop], output[..., stop:]], dim=-1)

    return hook


@contextmanager
def softmax_written_out(
    monkeypatch: pytest.MonkeyPatch,
    attention: nn.Module,
    weights_of: Callable[[int], torch.Tensor],
    text: slice,
) -> Iterator[None]:
    """In `attention` keys weigh as much more as `weights_of` them says, but to the queries `text`, before the sum."""

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
            logits = logits + (torch.where(attn_mask, 0.0, -math.inf) if attn_mask.dtype == torch.bool else attn_mask)
        weights = torch.exp(logits - logits.amax(-1, keepdim=True))
        louder = weights * weights_of(key.shape[2])[:, None, None].to(query.dtype)
        louder[:, :, text] = weights[:, :, text]
        return louder / louder.sum(-1, keepdim=True) @ value

    original = attention.forward

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
            return original(*args, **kwargs)

    with forward_as(attention, by_hand):
        yield
