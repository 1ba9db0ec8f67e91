"""HunyuanImage and HunyuanVideo: the text follows the image, and single-stream blocks, too, take both apart."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import HunyuanImageTransformer2DModel, HunyuanVideoTransformer3DModel
from torch import nn

from .family import BLOCKS, DIM, IMAGE_TEXT, JOINT_KEY, JOINT_VALUE, TEXT_DIM, Container, Draw, Family

HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": BLOCKS,
    "num_single_layers": BLOCKS,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT_DIM,
}


def hunyuan_image(**config: Any) -> Callable[[], nn.Module]:
    return lambda: HunyuanImageTransformer2DModel(**HUNYUAN, rope_axes_dim=(8, 8), **config)


def hunyuan_image_glyphs() -> nn.Module:
    model = hunyuan_image(text_embed_2_dim=TEXT_DIM)()
    model.context_embedder_2 = type(model.context_embedder_2)(TEXT_DIM, DIM, DIM)  # diffusers' is 2048 wide
    return model


def hunyuan_image_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(4, size, size),
        "encoder_hidden_states": draw(text_tokens, TEXT_DIM),
        "encoder_attention_mask": draw.mask(text_tokens),
        "timestep": draw.time(1000),
    }


def hunyuan_image_glyph_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    """Two tokens of ByT5, which spells what is written in the picture, among those of the prompt."""
    return hunyuan_image_inputs(draw, text_tokens - 2, size) | {
        "encoder_hidden_states_2": draw(2, TEXT_DIM),
        "encoder_attention_mask_2": draw.mask(2),
    }


def hunyuan_video(**config: Any) -> Callable[[], nn.Module]:
    return lambda: HunyuanVideoTransformer3DModel(
        **HUNYUAN, patch_size=1, pooled_projection_dim=TEXT_DIM, rope_axes_dim=(4, 6, 6), **config
    )


def hunyuan_video_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(4, 2, size, size),
        "encoder_hidden_states": draw(text_tokens, TEXT_DIM),
        "encoder_attention_mask": draw.mask(text_tokens),
        "pooled_projections": draw(TEXT_DIM),
        "timestep": draw.time(1000),
        "guidance": torch.full((draw.batch,), 6000.0, dtype=torch.float64),
    }


CONTAINERS = (
    Container("transformer_blocks", IMAGE_TEXT, "apart"),
    Container("single_transformer_blocks", IMAGE_TEXT, "apart", JOINT_KEY, JOINT_VALUE),
)

FAMILIES = [
    Family(
        "hunyuan-image",
        hunyuan_image(),
        hunyuan_image_inputs,
        CONTAINERS,
        text_last=True,
        not_checkpointed=None,
    ),
    Family(
        "hunyuan-image-glyphs",
        hunyuan_image_glyphs,
        hunyuan_image_glyph_inputs,
        CONTAINERS,
        text_last=True,
        not_checkpointed=None,
    ),
    Family("hunyuan-video", hunyuan_video(), hunyuan_video_inputs, CONTAINERS, text_last=True),
    Family(
        "hunyuan-video-i2v",  # whose blocks, of other classes, modulate the first frame apart
        hunyuan_video(image_condition_type="token_replace"),
        hunyuan_video_inputs,
        CONTAINERS,
        text_last=True,
    ),
]
