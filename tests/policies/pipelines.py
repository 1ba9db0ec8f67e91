"""Whole pipelines of a few thousand random weights, tokenizers included, built offline in well under a second.

Pictures are 16x16 pixels and 16 image tokens; each container of blocks holds as many as those of `families`.
"""

from string import ascii_letters, ascii_lowercase
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from .families import BLOCKS

TEXT_DIM = 32
CLIP_TOKENS = 12
LONGEST = 16  # T5's text is always as long, and Qwen-Image's at most
STEPS = 4


def louder(transformer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in transformer.parameters():  # the default is too small for one block to matter
            parameter.mul_(2.0)
    return transformer.eval()


# --- text --------------------------------------------------------------------------------------------------------


def clip_tokenizer() -> CLIPTokenizer:
    """Spells every word letter by letter, between two marks."""
    letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=CLIP_TOKENS
    )


def clip_encoder(kind: type = CLIPTextModel) -> Any:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    """Knows `a` and `red`; spells other words letter by letter, behind a piece for the space."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), ("▁a", -1.0), ("▁red", -1.0)]
    return T5Tokenizer(vocab=pieces + [(letter, -6.0) for letter in ascii_lowercase], extra_ids=0)


def t5_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=32,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval()


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Knows the words of the chat template, so that it is as long as in the real tokenizer; spells others in pieces."""
    template = "the image by detailing color shape size texture quantity text spatial relationships of objects and"
    words = ["Ġ" + word for word in [*template.split(), "background"]] + ["Describe", "system", "user", "assistant"]
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word)))
    tokens = dict.fromkeys([*marks, *ascii_letters, *":,ĠĊ", *("".join(pair) for pair in merges)])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=list(merges))
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:]})
    return tokenizer


def qwen_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_DIM,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


# --- pipelines ---------------------------------------------------------------------------------------------------


def autoencoder() -> AutoencoderKL:
    """Latents 4 x 8 x 8 of 16 x 16 pixels."""
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
    return vae.eval()


def sd3_pipeline(
    num_layers: int = 4, qk_norm: str | None = None, dual_attention_layers: tuple[int, ...] = (), seed: int = 0
) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 without its third text encoder: 12 + `max_sequence_length` text tokens."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm=qk_norm,
        dual_attention_layers=dual_attention_layers,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_pipeline() -> FluxPipeline:
    """FLUX.1 dev: CLIP's text as a whole, T5's token by token."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=BLOCKS,
        num_single_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = FluxPipeline(
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def qwen_image_pipeline() -> QwenImagePipeline:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    tokenizer = qwen_tokenizer()
    pipe = QwenImagePipeline(
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=qwen_encoder(tokenizer),
        tokenizer=tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_t5(pipe: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """An SD3 pipeline with its third text encoder: 12 tokens of CLIP, then those of T5."""
    torch.manual_seed(0)
    pipe.register_modules(text_encoder_3=t5_encoder(), tokenizer_3=t5_tokenizer())
    return pipe


def generate(pipe: Any, guided: bool = False, **kwargs: Any) -> torch.Tensor:
    """Latents (1, 16, 16) of FLUX.1 and Qwen-Image, (1, 4, 8, 8) of Stable Diffusion 3."""
    defaults = {
        "prompt": "a red cat",
        "num_inference_steps": STEPS,
        "height": 16,
        "width": 16,
        "max_sequence_length": LONGEST,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }
    scale = "guidance_scale" if isinstance(pipe, StableDiffusion3Pipeline) else "true_cfg_scale"
    defaults |= {scale: 3.0, "negative_prompt": "a dog"} if guided else {scale: 1.0}
    return pipe(**defaults | kwargs).images
