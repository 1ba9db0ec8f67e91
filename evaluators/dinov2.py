"""Evaluator `dinov2`: how much of a picture's content stays, by the cosine to its reference."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from .batches import in_batches
from .checkpoints import device, load_pretrained, load_processor
from .model_score import ModelFidelity


class DinoV2(ModelFidelity):
    """Cosine of the class tokens of picture and reference, in [-1, 1]; 1 for equal pictures. Oquab et al. 2023.

    (arXiv:2304.07193.) Blind to small shifts and details that `ssim` and `lpips` punish. The checkpoint is a model of
    transformers with a class token, facebook/dinov2-base when not given.
    """

    family = "dinov2"
    direction: Literal["maximize", "minimize"] = "maximize"
    worst = -1.0

    def __init__(self, checkpoint: str = ""):
        super().__init__(checkpoint)
        self.checkpoint = checkpoint or "facebook/dinov2-base"

    def compare(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> np.ndarray:
        return (self.vectors(pictures) * self.vectors(references)).sum(dim=-1).clamp(-1, 1).numpy()

    def vectors(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Unit class tokens of RGB pictures, float32 `(n, dim)` on the CPU."""
        from transformers import AutoImageProcessor, AutoModel

        model = load_pretrained(AutoModel, self.checkpoint)
        processor = load_processor(AutoImageProcessor, self.checkpoint, backend="pil")

        def embed(batch: Sequence[Image.Image]) -> torch.Tensor:
            inputs = processor(images=list(batch), return_tensors="pt").to(device(), model.dtype)
            return normalize(model(**inputs).last_hidden_state[:, 0].float(), dim=-1)

        return in_batches(embed, pictures)
