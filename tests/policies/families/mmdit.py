"""Families with double-stream blocks, and AuraFlow, whose single-stream blocks are given one joint stream."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView4Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from .family import BLOCKS, DIM, DOUBLE, IMAGE_TEXT, JOINED, TEXT_DIM, TEXT_IMAGE, Container, Draw, Family, Output


def sd3(**config: Any) -> Callable[[], nn.Module]:
    return lambda: SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=DIM,
        pooled_projection_dim=TEXT_DIM,
        pos_embed_max_size=8,
        **config,
    )


def sd3_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(4, 2 * size, 2 * size),
        "encoder_hidden_states": draw(text_tokens, TEXT_DIM),
        "pooled_projections": draw(TEXT_DIM),
        "timestep": draw.time(1000),
    }


def qwen_image(**config: Any) -> Callable[[], nn.Module]:
    return lambda: QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        num_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
        **config,
    )


def qwen_image_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(size * size, 4),
        "encoder_hidden_states": draw(text_tokens, TEXT_DIM),
        "encoder_hidden_states_mask": draw.mask(text_tokens).bool(),
        "timestep": draw.time(),
        "img_shapes": [[(1, size, size)]] * draw.batch,
    }


def qwen_image_edit_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    """A picture and, behind it, the one to edit, which has a modulation of its own."""
    inputs = qwen_image_inputs(draw, text_tokens, size)
    shapes = [[(1, size, size), (1, 2, size)]] * draw.batch
    return inputs | {"hidden_states": draw((size + 2) * size, 4), "img_shapes": shapes}


def auraflow() -> nn.Module:
    return AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=BLOCKS,
        num_single_dit_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=DIM,
        pos_embed_max_size=64,
    )


def auraflow_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(4, 2 * size, 2 * size),
        "encoder_hidden_states": draw(text_tokens, TEXT_DIM),
        "timestep": draw.time(),
    }


def cogview4() -> nn.Module:
    return CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=16,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )


def cogview4_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    side = torch.full((draw.batch, 2), 16.0 * size, dtype=torch.float64)
    return {
        "hidden_states": draw(4, 2 * size, 2 * size),
        "encoder_hidden_states": draw(text_tokens, TEXT_DIM),
        "timestep": draw.time(1000),
        "original_size": side,
        "target_size": side,
        "crop_coords": torch.zeros_like(side),
        "attention_mask": draw.mask(text_tokens),
    }


# The heads go before the tokens when it norms its keys.
SD3_NORMED = Container("transformer_blocks", TEXT_IMAGE, "apart", Output("attn.norm_added_k", tokens=2))

FAMILIES = [
    Family(
        "sd3",
        sd3(),
        sd3_inputs,
        (Container("transformer_blocks", TEXT_IMAGE, "apart", Output("attn.add_k_proj")),),  # keys have no norm
        text_last=True,
    ),
    Family("sd3.5-large", sd3(qk_norm="rms_norm"), sd3_inputs, (SD3_NORMED,), text_last=True),
    Family(
        "sd3.5-medium",
        sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        sd3_inputs,
        (SD3_NORMED,),
        text_last=True,
    ),
    Family("qwen-image", qwen_image(), qwen_image_inputs, (DOUBLE,)),
    Family("qwen-image-edit", qwen_image(zero_cond_t=True), qwen_image_edit_inputs, (DOUBLE,)),
    Family(
        "auraflow",
        auraflow,
        auraflow_inputs,
        (Container("joint_transformer_blocks", TEXT_IMAGE, "apart"), JOINED),
        registers=8,
    ),
    Family(
        "cogview4",
        cogview4,
        cogview4_inputs,
        (
            Container(
                "transformer_blocks",
                IMAGE_TEXT,
                "apart",
                Output("attn1.norm_k", tokens=2, image_too=True),
                Output("attn1.to_v", image_too=True),
            ),
        ),
    ),
]
