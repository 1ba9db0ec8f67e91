"""Evaluator `clip_iqa`: whether CLIP finds a picture nearer to "Good photo." than to "Bad photo.", in [0, 1]."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.func import functional_call
from torch.nn.functional import normalize
from torchvision.transforms.functional import normalize as standardize
from torchvision.transforms.functional import to_tensor

from .batches import in_batches, of_equal_size
from .checkpoints import CheckpointError, device, precision
from .clip import check_clip, load_clip
from .model_score import ModelScore

_PROMPTS = ["Good photo.", "Bad photo."]
_STRIDE = 32  # of a modified ResNet; smaller pictures leave it nothing to pool


class ClipIqa(ModelScore):
    """CLIP-IQA of Wang et al. 2023 (arXiv:2207.12396): softmax over e^scale cos to the two prompts, the first's share.

    As in github.com/IceClear/CLIP-IQA the picture is seen at its own size, and its ResNet pools without position
    embeddings; one with a side below 32 pixels leaves it nothing and gets the worst value. The checkpoint is an
    open_clip ResNet, RN50/openai by default. It never reads the prompt.
    """

    family = "clip_iqa"
    worst = 0.0

    def __init__(self, checkpoint: str = ""):
        super().__init__(checkpoint)
        self.checkpoint = checkpoint or "RN50/openai"
        check_clip(self.checkpoint)

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        clip = load_clip(self.checkpoint)
        visual, preprocess = clip.model.visual, clip.model.visual.preprocess_cfg
        if not hasattr(visual, "attnpool"):
            raise CheckpointError(f"{self.checkpoint} is no ResNet of CLIP; accepted: one, as RN50/openai")
        position = visual.attnpool.positional_embedding
        no_position = {"attnpool.positional_embedding": torch.zeros_like(position[:1])}  # (1, dim): none, for any size

        def embed(batch: Sequence[Image.Image]) -> torch.Tensor:
            pixels = torch.stack([to_tensor(picture) for picture in batch])  # (batch, 3, h, w)
            pixels = standardize(pixels, preprocess["mean"], preprocess["std"])
            vectors = functional_call(visual, no_position, pixels.to(device(), precision()))
            return normalize(vectors.float(), dim=-1)

        texts = clip.texts(_PROMPTS)  # (2, dim)
        scale = clip.model.logit_scale.exp().item()
        scores = np.full(len(pictures), self.worst)
        for group in of_equal_size(pictures):
            if min(pictures[group[0]].size) < _STRIDE:
                continue
            vectors = in_batches(embed, [pictures[i] for i in group])
            scores[group] = (scale * vectors @ texts.T).double().softmax(dim=-1)[:, 0].numpy()
        return scores
