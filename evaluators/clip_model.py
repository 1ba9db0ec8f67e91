"""A CLIP model of open_clip, loaded when first used: unit vectors of texts and pictures."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


class ClipModel:
    """`checkpoint` is `model/pretrained` as open_clip lists them, `hf-hub:name`, or a folder that open_clip saved.

    float32 on the device at hand; texts longer than the model's context are cut, as open_clip does. OpenAI's weights
    want a `-quickgelu` model: without it open_clip warns and computes something else.
    """

    def __init__(self, checkpoint: str | Path, batch: int = 32):
        self.checkpoint = str(checkpoint)
        self.batch = batch

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any, torch.device]:
        return _load(self.checkpoint)

    @torch.inference_mode()
    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float64 `(n, dim)`, of length 1 each."""
        model, _, tokenizer, device = self._loaded
        return _joined(
            model.encode_text(tokenizer(list(texts[start : start + self.batch])).to(device))
            for start in range(0, len(texts), self.batch)
        )

    @torch.inference_mode()
    def of_pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """float64 `(n, dim)`, of length 1 each; by the model's own transform."""
        model, transform, _, device = self._loaded
        return _joined(
            model.encode_image(torch.stack([transform(p) for p in pictures[start : start + self.batch]]).to(device))
            for start in range(0, len(pictures), self.batch)
        )


@lru_cache(maxsize=4)  # evaluators that name the same weights share them
def _load(checkpoint: str) -> tuple[Any, Any, Any, torch.device]:
    import open_clip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (Path(checkpoint) / "open_clip_config.json").is_file():
        model, pretrained = f"local-dir:{checkpoint}", None
    elif checkpoint.startswith("hf-hub:"):
        model, pretrained = checkpoint, None
    else:
        model, _, pretrained = checkpoint.partition("/")
        if not pretrained:
            raise ValueError(f"clip is {checkpoint!r}; accepted: model/pretrained, hf-hub:name, or an open_clip folder")
    made, _, transform = open_clip.create_model_and_transforms(model, pretrained=pretrained, device=device)
    return made.eval(), transform, open_clip.get_tokenizer(model), device


def _joined(batches) -> np.ndarray:
    vectors = [torch.nn.functional.normalize(batch.float(), dim=-1).cpu().numpy() for batch in batches]
    return np.concatenate(vectors).astype(np.float64) if vectors else np.empty((0, 0))
