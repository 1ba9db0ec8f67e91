"""Flux, Flux 2 and Chroma: double-stream blocks, then single-stream ones."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ChromaTransformer2DModel, Flux2Transformer2DModel, FluxTransformer2DModel
from torch import nn

from .family import (
    BLOCKS,
    DIM,
    DOUBLE,
    IMAGE,
    JOINED,
    JOINT_KEY,
    JOINT_VALUE,
    TEXT_DIM,
    TEXT_IMAGE,
    Container,
    Draw,
    Family,
    Output,
)

FLUX = {
    "in_channels": 4,
    "num_layers": BLOCKS,
    "num_single_layers": BLOCKS,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_DIM,
}


def flux(guidance_embeds: bool = True, **config: Any) -> Callable[[], nn.Module]:
    return lambda: FluxTransformer2DModel(
        **FLUX | config, pooled_projection_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6), guidance_embeds=guidance_embeds
    )


def schnell_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(size * size, 4),
        "encoder_hidden_states": draw(text_tokens, TEXT_DIM),
        "pooled_projections": draw(TEXT_DIM),
        "timestep": draw.time(),
        "img_ids": grid_ids(size, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
    }


def dev_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    return schnell_inputs(draw, text_tokens, size) | {"guidance": torch.full((draw.batch,), 3.5)}


def kontext_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    """The tokens of a reference picture stand behind those of the image, marked by their first axis."""
    reference = grid_ids(size, 3)
    reference[:, 0] = 1
    return dev_inputs(draw, text_tokens, size) | {
        "hidden_states": draw(2 * size * size, 4),
        "img_ids": torch.cat([grid_ids(size, 3), reference]),
    }


def fill_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    """The picture to fill and its mask stand beside the latents, in channels of their own."""
    return dev_inputs(draw, text_tokens, size) | {"hidden_states": draw(size * size, 12)}


def flux2(**config: Any) -> Callable[[], nn.Module]:
    return lambda: Flux2Transformer2DModel(**FLUX, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), **config)


def flux2_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    text_ids = torch.zeros(text_tokens, 4)
    text_ids[:, 3] = torch.arange(text_tokens)
    return {
        "hidden_states": draw(size * size, 4),
        "encoder_hidden_states": draw(text_tokens, TEXT_DIM),
        "timestep": draw.time(),
        "img_ids": grid_ids(size, 4),
        "txt_ids": text_ids,
        "guidance": torch.full((draw.batch,), 3.5),
    }


def klein_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    return flux2_inputs(draw, text_tokens, size) | {"guidance": None}


def chroma() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers builds it from a part that it deprecates itself
        return ChromaTransformer2DModel(
            **FLUX,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )


def chroma_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    inputs = schnell_inputs(draw, text_tokens, size)
    del inputs["pooled_projections"]
    mask = torch.cat([draw.mask(text_tokens), torch.ones(draw.batch, size * size)], dim=1)
    return inputs | {"attention_mask": mask.double()}  # which the pipeline, too, passes as numbers


def grid_ids(size: int, axes: int) -> torch.Tensor:
    """(size * size, axes): row and column of each image token in axes 1 and 2."""
    ids = torch.zeros(size, size, axes)
    ids[..., 1] = torch.arange(size)[:, None]
    ids[..., 2] = torch.arange(size)
    return ids.flatten(0, 1)


FLUX_CONTAINERS = (
    DOUBLE,
    Container("single_transformer_blocks", TEXT_IMAGE, "apart", JOINT_KEY, JOINT_VALUE),
)
# One module computes queries, keys, values and then the MLP's input.
FUSED = Output("attn.to_qkv_mlp_proj", image_too=True, columns=(2 * DIM, 3 * DIM))

FLUX2_CONTAINERS = (DOUBLE, Container("single_transformer_blocks", IMAGE, "joined", JOINT_KEY, FUSED))

FAMILIES = [
    Family("flux-dev", flux(), dev_inputs, FLUX_CONTAINERS),
    Family("flux-kontext", flux(), kontext_inputs, FLUX_CONTAINERS),
    Family("flux-fill", flux(in_channels=12, out_channels=4), fill_inputs, FLUX_CONTAINERS),
    Family("flux-schnell", flux(guidance_embeds=False), schnell_inputs, FLUX_CONTAINERS),
    Family("flux2", flux2(), flux2_inputs, FLUX2_CONTAINERS),
    Family("flux2-klein", flux2(guidance_embeds=False), klein_inputs, FLUX2_CONTAINERS),
    Family(
        "chroma",
        chroma,
        chroma_inputs,
        (DOUBLE, JOINED),
        index_matters=True,
        not_checkpointed=("attention_mask",),
    ),
]
