"""What differs between transformer classes, one row per class; a class without a row is refused, never guessed."""

import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from .error import PolicyError


@dataclass(frozen=True)
class Architecture:
    """How to find and call the blocks of one transformer class of diffusers.

    Blocks take `(hidden_states, encoder_hidden_states, ...)`: image tokens `(batch, tokens, dim)`, text tokens
    `(batch, tokens, dim)`, then arguments that blocktune hands on unread. They return both streams; a stream that a
    block does not produce (the text of the last SD3 block) is None.
    """

    transformer: str  # class name
    containers: tuple[str, ...]  # ModuleLists that hold the blocks, in execution order
    text_first: bool  # blocks return (text, image), not (image, text)
    attention: str  # attribute of a block: the attention that joins text and image
    processors: tuple[str, ...]  # attention processors whose arithmetic `attention.py` reproduces
    batched_guidance: bool  # pipelines run both halves of guidance in one call, unconditional rows first
    perturbed_by: str | None  # forward argument present only in the extra, conditional-only call of perturbed guidance


ARCHITECTURES: dict[str, Architecture] = {
    row.transformer: row
    for row in (
        # SD3, SD3.5-Large, and SD3.5-Medium, whose first blocks have a second attention (`attn2`) over image tokens.
        Architecture(
            transformer="SD3Transformer2DModel",
            containers=("transformer_blocks",),
            text_first=True,
            attention="attn",
            processors=("JointAttnProcessor2_0",),
            batched_guidance=True,
            perturbed_by="skip_layers",
        ),
    )
}


def unwrapped(transformer: Any) -> Any:
    """The module inside what `torch.compile(module)` returned; any other object as it is."""
    return getattr(transformer, "_orig_mod", transformer)


def resolve(target: Any) -> tuple[nn.Module, Architecture]:
    """The transformer of a pipeline (or the transformer itself), out of any `torch.compile` wrapper, and its row.

    Raises PolicyError when there is no transformer or its class has no row.
    """
    transformer = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
    transformer = unwrapped(transformer)
    if not isinstance(transformer, nn.Module):
        raise PolicyError(
            f"{type(target).__name__} has no transformer; give a diffusers pipeline that has one, or the transformer."
        )
    name = type(transformer).__name__
    if name not in ARCHITECTURES:
        raise PolicyError(f"{name} is not a known architecture; blocktune knows {', '.join(ARCHITECTURES)}.")
    return transformer, ARCHITECTURES[name]


def block_slots(transformer: nn.Module, architecture: Architecture) -> list[tuple[dict[str, nn.Module | None], str]]:
    """Where each block hangs, in execution order: the child dict of its ModuleList, and its key there."""
    containers = [getattr(transformer, name) for name in architecture.containers]
    return [(container._modules, key) for container in containers for key in container._modules]


def fingerprint(transformer: nn.Module) -> str:
    """sha256 of the architecture fields of the config: the constructor's arguments that are not at their default.

    Paths, dtype, library version and quantisation are no constructor arguments, so they do not enter; an argument that
    a later diffusers adds changes nothing while it is at its default.
    """
    config: Any = transformer.config
    parameters = inspect.signature(type(transformer).__init__).parameters
    plain = json.loads(json.dumps({name: config[name] for name in parameters if name in config}, default=str))
    defaults = json.loads(json.dumps({name: parameters[name].default for name in plain}, default=str))
    fields = {name: value for name, value in plain.items() if value != defaults[name]}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
