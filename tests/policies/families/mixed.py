"""Z-Image and Lumina 2: one stream whose rows hold text of different lengths, so nothing can tell where it is."""

from typing import Any

from diffusers import Lumina2Transformer2DModel, ZImageTransformer2DModel
from torch import nn

from .family import BLOCKS, DIM, IMAGE, TEXT_DIM, Container, Draw, Family


def z_image() -> nn.Module:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=DIM,
        n_layers=BLOCKS,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_DIM,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
    )


def z_image_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    text = draw(text_tokens, TEXT_DIM).unbind()
    return {
        "x": list(draw(4, 1, 2 * size, 2 * size).unbind()),
        "t": draw.time(),
        "cap_feats": [row[: int(kept.sum())] for row, kept in zip(text, draw.mask(text_tokens), strict=True)],
    }


def lumina2() -> nn.Module:
    return Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=DIM,
        num_layers=BLOCKS,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 16, 16),
        cap_feat_dim=TEXT_DIM,
    )


def lumina2_inputs(draw: Draw, text_tokens: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(4, 2 * size, 2 * size),
        "encoder_hidden_states": draw(text_tokens, TEXT_DIM),
        "encoder_attention_mask": draw.mask(text_tokens),
        "timestep": draw.time(),
    }


FAMILIES = [
    Family("z-image", z_image, z_image_inputs, (Container("layers", ("x",), "mixed"),)),
    Family("lumina2", lumina2, lumina2_inputs, (Container("layers", IMAGE, "mixed"),)),
]
