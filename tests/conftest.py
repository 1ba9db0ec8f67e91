"""A whole Stable Diffusion 3 pipeline of a few thousand random weights, built offline in well under a second."""

from collections.abc import Callable
from string import ascii_lowercase

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer


def _tokenizer() -> CLIPTokenizer:
    """Spells every word letter by letter."""
    letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=12)


def _text_encoder() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config)


def build_tiny_sd3_pipeline(
    num_layers: int = 4, qk_norm: str | None = None, dual_attention_layers: tuple[int, ...] = (), seed: int = 0
) -> StableDiffusion3Pipeline:
    """16x16 pixels, latents 4 x 8 x 8, 16 image tokens, 12 + `max_sequence_length` text tokens; no third encoder."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm=qk_norm,
        dual_attention_layers=dual_attention_layers,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():  # the default is too small for one block to matter
            parameter.mul_(2.0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=_text_encoder().eval(),
        tokenizer=_tokenizer(),
        text_encoder_2=_text_encoder().eval(),
        tokenizer_2=_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_sd3_pipeline() -> Callable[..., StableDiffusion3Pipeline]:
    """The builder: `tiny_sd3_pipeline(num_layers=4, qk_norm=None, dual_attention_layers=(), seed=0)`."""
    return build_tiny_sd3_pipeline
