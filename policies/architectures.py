"""What differs between transformer classes, one row per class; a class without a row is refused, never guessed.

Read off diffusers 0.42: `diffusers.models.transformers`, and for `guidance` the pipelines of the class.
"""

import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from .error import PolicyError

# How the blocks of a ModuleList take and return text and image tokens, each `(batch, tokens, dim)`.
Streams: TypeAlias = Literal[
    "text, image",  # takes both, returns (text, image)
    "image, text",  # takes both, returns (image, text)
    "joined",  # takes and returns one tensor, the text in front
    "image",  # takes both, returns the image: the text is the same for every block
    "mixed",  # takes and returns one tensor in which text and image cannot be told apart from outside
]


@dataclass(frozen=True)
class Blocks:
    """The blocks of one ModuleList: their streams, and the attention in which the image hears the text.

    The first argument of a block is `hidden_states`, the second, where it takes text by itself,
    `encoder_hidden_states`; what follows blocktune hands on unread.
    """

    container: str  # the ModuleList
    streams: Streams
    attention: str = "attn"  # attribute of a block
    text_keys: Literal["first", "last", "all"] = "first"  # where the text stands among the attention's keys


@dataclass(frozen=True)
class Segment:
    """A stretch of the text stream: what one tokenizer makes of one argument of `encode_prompt`."""

    tokenizer: str  # attribute of the pipeline; where that is None the stretch is padding
    argument: str
    # tokens: "tokenizer_max_length" of the pipeline, the argument `max_sequence_length`, or what the texts need
    length: Literal["tokenizer_max_length", "max_sequence_length", "longest"]
    template: str | None = None  # attribute of the pipeline: the text that the prompt is put into at "{}"
    dropped: str | None = None  # attribute of the pipeline: how many tokens at the front are dropped
    shared_with: str | None = None  # another argument whose tokens share the stretch


@dataclass(frozen=True)
class Architecture:
    """How to find and call the blocks of one transformer class of diffusers."""

    transformer: str  # class name
    blocks: tuple[Blocks, ...]  # in execution order
    # Pipelines run both halves of guidance in one call, unconditional rows first, or the conditional and then the
    # unconditional call; some name those calls by `transformer.cache_context`.
    guidance: Literal["batched", "calls"]
    perturbed_by: str | None = (
        None  # forward argument present only in the extra, conditional-only call of perturbed guidance
    )
    latents: str = "hidden_states"  # forward argument of the image
    width: str | None = None  # config field of the streams' width; None: number of heads times their dimension
    pads_to: int = 1  # text and image are each padded to a multiple of as many tokens
    registers: str | None = None  # parameter `(1, tokens, dim)` put in front of the text
    image_in_text: str | None = None  # config field that is set where image tokens stand in the text stream
    filled_by: str | None = None  # forward argument present in calls that fill or read a cache inside of the blocks
    truncated_by: str | None = None  # argument of the pipeline by which it ends guidance itself
    text: tuple[Segment, ...] = ()  # what the text stream is made of, where the tokens of a prompt can be located


_JOINT = Blocks("transformer_blocks", "text, image")
_HUNYUAN = (
    Blocks("transformer_blocks", "image, text", text_keys="last"),
    Blocks("single_transformer_blocks", "image, text", text_keys="last"),
)

ARCHITECTURES: dict[str, Architecture] = {
    row.transformer: row
    for row in (
        # SD3, SD3.5-Large, and SD3.5-Medium, whose first blocks have a second attention (`attn2`) over image tokens
        Architecture(
            "SD3Transformer2DModel",
            (Blocks("transformer_blocks", "text, image", text_keys="last"),),
            guidance="batched",
            perturbed_by="skip_layers",
            text=(
                # CLIP-L and CLIP-G read the same words at the same places; T5 follows
                Segment("tokenizer", "prompt", "tokenizer_max_length", shared_with="prompt_2"),
                Segment("tokenizer_3", "prompt_3", "max_sequence_length"),
            ),
        ),
        # FLUX.1 dev, schnell, Kontext (whose reference tokens stand behind the image), Fill
        Architecture(
            "FluxTransformer2DModel",
            (_JOINT, Blocks("single_transformer_blocks", "text, image")),
            guidance="calls",
            text=(Segment("tokenizer_2", "prompt_2", "max_sequence_length"),),
        ),
        # FLUX.2 dev, klein
        Architecture(
            "Flux2Transformer2DModel",
            (_JOINT, Blocks("single_transformer_blocks", "joined")),
            guidance="calls",
            filled_by="kv_cache_mode",
        ),
        # Qwen-Image; in Qwen-Image-Edit the text stream also holds what the encoder saw of the input picture
        Architecture(
            "QwenImageTransformer2DModel",
            (_JOINT,),
            guidance="calls",
            text=(
                Segment(
                    "tokenizer",
                    "prompt",
                    "longest",
                    template="prompt_template_encode",
                    dropped="prompt_template_encode_start_idx",
                ),
            ),
        ),
        Architecture(
            "AuraFlowTransformer2DModel",
            (Blocks("joint_transformer_blocks", "text, image"), Blocks("single_transformer_blocks", "joined")),
            guidance="batched",
            registers="register_tokens",
        ),
        Architecture(
            "ChromaTransformer2DModel", (_JOINT, Blocks("single_transformer_blocks", "joined")), guidance="calls"
        ),
        Architecture(
            "CogView4Transformer2DModel",
            (Blocks("transformer_blocks", "image, text", attention="attn1"),),
            guidance="calls",
        ),
        Architecture("HunyuanImageTransformer2DModel", _HUNYUAN, guidance="calls"),
        Architecture("HunyuanVideoTransformer3DModel", _HUNYUAN, guidance="calls"),
        # the refiners of Z-Image and Lumina2, which see one stream alone, are not counted as blocks
        Architecture(
            "ZImageTransformer2DModel",
            (Blocks("layers", "mixed"),),
            guidance="batched",
            latents="x",
            width="dim",
            pads_to=32,
            truncated_by="cfg_truncation",
        ),
        Architecture("Lumina2Transformer2DModel", (Blocks("layers", "mixed"),), guidance="calls", width="hidden_size"),
        Architecture(
            "LTXVideoTransformer3DModel",
            (Blocks("transformer_blocks", "image", attention="attn2", text_keys="all"),),
            guidance="batched",
        ),
        Architecture(
            "WanTransformer3DModel",
            (Blocks("blocks", "image", attention="attn2", text_keys="all"),),
            guidance="calls",
            image_in_text="added_kv_proj_dim",
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


@dataclass(frozen=True)
class Slot:
    """Where a block hangs, the child dict of its ModuleList and its key there, and what kind it is."""

    children: dict[str, nn.Module | None]
    key: str
    kind: Blocks

    @property
    def block(self) -> nn.Module:
        """The module that hangs there now."""
        block = self.children[self.key]
        assert block is not None
        return block


def block_slots(transformer: nn.Module, architecture: Architecture) -> list[Slot]:
    """The slots of all blocks, in execution order."""
    containers = [(kind, getattr(transformer, kind.container)) for kind in architecture.blocks]
    return [Slot(container._modules, key, kind) for kind, container in containers for key in container._modules]


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
