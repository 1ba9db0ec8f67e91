"""LTX-Video and Wan: the image attends to a text that no block changes, with Wan also to a picture in front of it."""

from collections.abc import Callable
from typing import Any

from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from torch import nn

from .family import BLOCKS, DIM, IMAGE, TEXT_DIM, Container, Draw, Family, Output


def ltx() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=DIM,
        num_layers=BLOCKS,
        caption_channels=TEXT_DIM,
    )


def ltx_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(2 * size * size, 4),
        "encoder_hidden_states": draw(text_tokens, TEXT_DIM),
        "encoder_attention_mask": draw.mask(text_tokens),
        "timestep": draw.time(1000),
        "num_frames": 2,
        "height": size,
        "width": size,
    }


def wan(**config: Any) -> Callable[[], nn.Module]:
    return lambda: WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=DIM,
        num_layers=BLOCKS,
        rope_max_seq_len=16,
        **config,
    )


def wan_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(4, 2, 2 * size, 2 * size),
        "encoder_hidden_states": draw(text_tokens, TEXT_DIM),
        "timestep": draw.time(1000),
    }


def wan_i2v_inputs(draw: Draw, _: int, size: int) -> dict[str, Any]:
    """Three tokens of a picture in front of the text, which Wan's attention takes to be 512 tokens long."""
    return wan_inputs(draw, 512, size) | {"encoder_hidden_states_image": draw(3, TEXT_DIM)}


CONSTANT = (IMAGE, "constant", Output("attn2.norm_k"), Output("attn2.to_v"))

FAMILIES = [
    Family("ltx", ltx, ltx_inputs, (Container("transformer_blocks", *CONSTANT),)),
    Family("wan", wan(), wan_inputs, (Container("blocks", *CONSTANT),)),
    Family(
        "wan-i2v",
        wan(image_dim=TEXT_DIM, added_kv_proj_dim=DIM),
        wan_i2v_inputs,
        (Container("blocks", IMAGE, "mixed"),),
    ),
]
