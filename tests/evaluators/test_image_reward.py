import numpy as np
import pytest
import torch
from blocktune.evaluators import CheckpointError, get
from PIL import Image
from torch.nn.functional import gelu, layer_norm, linear

from .test_clip_scores import PROMPTS, photos

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def attend(x: torch.Tensor, context: torch.Tensor, layer, heads: int, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax attention of tokens x `(tokens, dim)` to a context, head by head; `layer` gives projections by name."""
    q, k, v = (layer(name)(source) for name, source in (("query", x), ("key", context), ("value", context)))
    width = q.shape[-1] // heads
    parts = []
    for start in range(0, q.shape[-1], width):
        part = slice(start, start + width)
        scores = q[:, part] @ k[:, part].T / width**0.5
        if kept is not None:
            scores = scores.masked_fill(~kept, -torch.inf)
        parts.append(scores.softmax(-1) @ v[:, part])
    return layer("output")(torch.cat(parts, -1))


def reward_by_hand(state: dict[str, torch.Tensor], picture: Image.Image, tokens: list[int], mask: list[int]) -> float:
    """ViT and BERT with cross-attention (Li et al. 2022), the head and its standardisation (Xu et al. 2023)."""

    def dense(name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    side = 32
    scale = side / min(picture.size)
    sized = picture.resize([int(s * scale) for s in picture.size], Image.Resampling.BICUBIC)
    left, top = round((sized.width - side) / 2), round((sized.height - side) / 2)
    pixels = torch.tensor(np.asarray(sized.crop((left, top, left + side, top + side))) / 255, dtype=torch.float32)
    pixels = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
    v = "blip.visual_encoder"
    patches = pixels.reshape(4, 8, 4, 8, 3).permute(0, 2, 4, 1, 3).reshape(16, -1)
    x = patches @ state[f"{v}.patch_embed.proj.weight"].flatten(1).T + state[f"{v}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{v}.cls_token"][0], x]) + state[f"{v}.pos_embed"][0]
    for block in (f"{v}.blocks.{i}" for i in range(2)):

        def qkv(name: str, block: str = block):
            if name == "output":
                return lambda y: dense(f"{block}.attn.proj", y)
            i = ["query", "key", "value"].index(name)
            return lambda y: dense(f"{block}.attn.qkv", y).chunk(3, -1)[i]

        h = norm(f"{block}.norm1", x, 1e-6)
        x = x + attend(h, h, qkv, heads=2)
        x = x + dense(f"{block}.mlp.fc2", gelu(dense(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{v}.norm", x, 1e-6)
    t = "blip.text_encoder"
    y = state[f"{t}.embeddings.word_embeddings.weight"][tokens]
    y = y + state[f"{t}.embeddings.position_embeddings.weight"][: len(tokens)]
    y = norm(f"{t}.embeddings.LayerNorm", y, 1e-12)
    for layer in (f"{t}.encoder.layer.{i}" for i in range(2)):
        for kind, context, kept in (("attention", None, torch.tensor(mask).bool()), ("crossattention", seen, None)):

            def part(name: str, at: str = f"{layer}.{kind}"):
                return lambda z: dense(f"{at}.output.dense" if name == "output" else f"{at}.self.{name}", z)

            attended = attend(y, y if context is None else context, part, heads=1, kept=kept)
            y = norm(f"{layer}.{kind}.output.LayerNorm", attended + y, 1e-12)
        wide = gelu(dense(f"{layer}.intermediate.dense", y))
        y = norm(f"{layer}.output.LayerNorm", dense(f"{layer}.output.dense", wide) + y, 1e-12)
    reward = y[0]
    for index in (0, 2, 4, 6, 7):
        reward = dense(f"mlp.layers.{index}", reward)
    return (reward.item() - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_the_published_model(model_scores):
    from transformers import BertTokenizer

    name = model_scores["image_reward"]
    file, tokenizer_folder = name.partition(":")[2].split(" with ")
    tokenizer = BertTokenizer.from_pretrained(tokenizer_folder)
    state = torch.load(file)
    expected = []
    for picture, prompt in zip(photos(), PROMPTS, strict=True):
        tokens = tokenizer(prompt)["input_ids"][:35]
        padding = 35 - len(tokens)
        expected.append(reward_by_hand(state, picture, tokens + [0] * padding, [1] * len(tokens) + [0] * padding))
    scores = get(name).score(photos(), PROMPTS)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    same_prompt = get(name).score(photos(), ["a"] * 3)
    assert np.ptp(same_prompt) > 1e-4  # the picture is heard


def test_another_file_is_refused(model_scores, tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pt")
    tokenizer = model_scores["image_reward"].split(" with ")[1]
    with pytest.raises(CheckpointError, match=r"other\.pt does not fit; accepted: ImageReward\.pt"):
        get(f"image_reward:{tmp_path / 'other.pt'} with {tokenizer}").score(photos(), PROMPTS)
