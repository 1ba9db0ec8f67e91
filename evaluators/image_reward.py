"""Evaluator `image_reward`: how people would rate a picture for its prompt, by a BLIP that reads both together."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from .aesthetic import MLP_LAYERS, fold
from .batches import in_batches
from .checkpoints import CheckpointError, device, download, load_processor, load_state, precision
from .model_score import ModelScore

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of rewards over the prompts of the authors
_TOKENS = 35  # longer prompts are cut
_HEAD = 64  # width of an attention head, of ViT-L and BERT alike


class ImageReward(ModelScore):
    """ImageReward v1.0, about -2 to 2. Xu et al. 2023 (arXiv:2304.05977), github.com/THUDM/ImageReward.

    The reward is affine in the first token of BERT, which attends to the tokens of the picture; standardised. The
    checkpoint is `FILE with TOKENIZER`: ImageReward.pt of THUDM/ImageReward and bert-base-uncased when not given. Depth
    and widths are read from the weights.
    """

    family = "image_reward"
    scale = 4.0

    def __init__(self, checkpoint: str = ""):
        super().__init__(checkpoint)
        self._file, _, tokenizer = checkpoint.partition(" with ")
        self._tokenizer = tokenizer or "bert-base-uncased"

    @property
    def worst(self) -> float:
        _, text, weight, bias = _load(self._file)
        norm = text.encoder.layer[-1].output.LayerNorm  # gives scale * x + shift with |x|^2 = dim
        scale, shift = norm.weight.double().cpu(), norm.bias.double().cpu()
        lowest = bias + weight @ shift - (weight * scale).norm() * len(weight) ** 0.5
        return (lowest.item() - _MEAN) / _STD

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from transformers import BertTokenizer

        vision, text, weight, bias = _load(self._file)
        tokenizer = load_processor(BertTokenizer, self._tokenizer)
        transform: Any = image_transform_v2(PreprocessCfg(size=vision.patch_embed.img_size), is_train=False)

        def read(batch: Sequence[tuple[Image.Image, str]]) -> torch.Tensor:
            pixels = torch.stack([transform(picture) for picture, _ in batch])  # (batch, 3, h, w)
            tokens = tokenizer(
                [prompt for _, prompt in batch],
                padding="max_length",
                truncation=True,
                max_length=_TOKENS,
                return_tensors="pt",
            ).to(device())
            seen = vision.forward_features(pixels.to(device(), text.dtype))  # (batch, patches + 1, dim)
            output = text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
            return output.last_hidden_state[:, 0]

        first = in_batches(read, list(zip(pictures, prompts, strict=True))).double()  # (n, dim)
        return ((first @ weight + bias - _MEAN) / _STD).numpy()


@cache
def _load(file: str) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Vision transformer, BERT, and the reward head as weight `(dim,)` and bias `()`."""
    from accelerate import init_empty_weights
    from timm.models import VisionTransformer
    from transformers import BlipTextConfig, BlipTextModel

    where = file or download("THUDM/ImageReward", "ImageReward.pt")
    state = load_state(where)
    parts: dict[str, dict[str, torch.Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for key, value in state.items():
        for prefix, part in parts.items():
            if key.startswith(prefix):
                part[key.removeprefix(prefix)] = value
    seen, read, head = parts.values()
    read.pop("embeddings.position_ids", None)  # a buffer of older transformers
    try:
        with init_empty_weights():
            vision = VisionTransformer(
                img_size=int((seen["pos_embed"].shape[1] - 1) ** 0.5) * seen["patch_embed.proj.weight"].shape[-1],
                patch_size=seen["patch_embed.proj.weight"].shape[-1],
                embed_dim=seen["pos_embed"].shape[-1],
                depth=sum(key.endswith("attn.qkv.weight") for key in seen),
                num_heads=seen["pos_embed"].shape[-1] // _HEAD,
                num_classes=0,
            )
        words, dim = read["embeddings.word_embeddings.weight"].shape
        config = BlipTextConfig(
            vocab_size=words,
            hidden_size=dim,
            encoder_hidden_size=seen["pos_embed"].shape[-1],
            intermediate_size=read["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=sum(key.endswith("attention.self.query.weight") for key in read) // 2,
            num_attention_heads=dim // _HEAD,
            max_position_embeddings=read["embeddings.position_embeddings.weight"].shape[0],
        )
        with init_empty_weights():
            text = BlipTextModel(config, add_pooling_layer=False)
        vision.load_state_dict(seen, assign=True)
        text.load_state_dict(read, assign=True)
    except (KeyError, RuntimeError) as error:
        sentence = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {where} does not fit; accepted: ImageReward.pt ({sentence})") from None
    weight, bias = fold(head, MLP_LAYERS, where)
    return _ready(vision), _ready(text), weight, bias


def _ready(model: nn.Module) -> nn.Module:
    return model.eval().to(device(), precision())
