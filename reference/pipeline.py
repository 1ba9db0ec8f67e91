"""The reference model as a diffusers pipeline: its architecture, its tokenizer, and how to load the trained weights."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from .scenes import COLORS, NUMBERS, RELATIONS, SHAPES, SIZE, plural

WEIGHTS = Path(__file__).parent / "weights"
CLIP_TOKENS = 14  # the longest prompt has 11 words, and CLIP adds two marks
T5_TOKENS = 12  # and T5 one
# What the scores of the model card were measured with. SD3 pads T5's part of the prompt to `max_sequence_length`,
# 256 unless told, and attends to the padding: the model has met that length too, but 12 is much the faster.
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 6.0, "max_sequence_length": T5_TOKENS}


def load_pipeline(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> StableDiffusion3Pipeline:
    """The trained reference pipeline: 48x48 pixel pictures of coloured shapes, 12 blocks, guidance batched.

    Weights are stored in bfloat16 and loaded as `dtype`, float32 unless told. Nothing is downloaded.
    """
    if not (WEIGHTS / "model_index.json").exists():
        raise FileNotFoundError(f"no reference weights in {WEIGHTS}; run python -m blocktune.reference.train")
    pipe = StableDiffusion3Pipeline.from_pretrained(str(WEIGHTS), dtype=dtype or torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


WORDS = sorted(
    {"a", "an", "photo", "of", "and", "one", *NUMBERS, *COLORS, *SHAPES, *map(plural, SHAPES)}
    | {word for relation in RELATIONS for word in relation.split()}
)
_LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


def new_clip_tokenizer(words: Sequence[str] = WORDS, length: int = CLIP_TOKENS) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte pairs merge each of `words` to one token; other words fall into letters."""
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    letters = _LETTERS + [letter + "</w>" for letter in _LETTERS]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    trainer = BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(words, trainer)  # merges until each word is one token
    learned = json.loads(bpe.to_str())["model"]
    tokens = dict.fromkeys([*letters, *sorted(learned["vocab"], key=learned["vocab"].__getitem__), *marks])
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, rules = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        rules.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in learned["merges"]) + "\n")
        return CLIPTokenizer(vocab=str(vocabulary), merges=str(rules), model_max_length=length)


def new_t5_tokenizer() -> T5Tokenizer:
    """A T5 unigram tokenizer with one piece per word of this world, and letters for any other."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -1.0) for word in WORDS] + [(letter, -6.0) for letter in _LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


def new_autoencoder() -> AutoencoderKL:
    """48x48 pixels to 12x12 latents of 8 channels."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),  # pyright: ignore[reportArgumentType]  (annotated as one-tuples)
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]  (annotated as one-tuples)
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]  (annotated as one-tuples)
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def new_clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A CLIP text tower of width 96; SD3 reads its last but one layer token by token, its end token as a whole."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,  # pyright: ignore[reportArgumentType]
            eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
            pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
        )
    )


def new_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_kv=32,
            d_ff=384,
            dropout_rate=0.0,
            num_layers=1,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
            eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
        )
    )


def new_transformer() -> SD3Transformer2DModel:
    """12 joint blocks of width 96 over 36 image tokens (2x2 latents each) and 26 text tokens; 4.1 M parameters."""
    return SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=8,
        num_layers=12,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=192,
        caption_projection_dim=96,
        pooled_projection_dim=192,
        out_channels=8,
        pos_embed_max_size=SIZE // 8,
        qk_norm="rms_norm",
    )


def new_pipeline() -> StableDiffusion3Pipeline:
    """The untrained pipeline."""
    clip_tokenizer, t5_tokenizer = new_clip_tokenizer(), new_t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=new_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=new_autoencoder(),
        text_encoder=new_clip_encoder(clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=new_clip_encoder(clip_tokenizer),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=new_t5_encoder(t5_tokenizer),
        tokenizer_3=t5_tokenizer,
    )
