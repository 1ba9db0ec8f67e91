"""Evaluators `clip_score`, `siglip_score`, `hps_v2.1` and `pick_score`: how a picture fits its prompt, by a cosine.

All see one vector of the picture and one of the text: they hear which things are there, and hardly how many, where, or
of which colour each.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from .batches import in_batches
from .checkpoints import CheckpointError, device, download, load_pretrained, load_processor
from .clip import Clip, check_clip, load_clip
from .model_score import ModelScore


class _OfClip(ModelScore):
    """By an open_clip model, which the name has to give."""

    worst = 0.0

    def __init__(self, checkpoint: str = ""):
        super().__init__(checkpoint)
        check_clip(checkpoint)
        self.checkpoint = checkpoint


class ClipScore(_OfClip):
    """100 max(cos, 0) of picture and prompt, in [0, 100]; Hessel et al. 2021 (arXiv:2104.08718) write 2.5 for 100.

    The checkpoint is an open_clip model, named as in `clip.py`: `clip_score:ViT-B-32/openai`.
    """

    family = "clip_score"
    scale = 40.0  # Hessel et al. saw cosines from 0 to about 0.4, and multiply by 2.5

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return 100 * load_clip(self.checkpoint).cosines(pictures, prompts).clamp(min=0).numpy()


class SiglipScore(_OfClip):
    """Probability in [0, 1] that picture and prompt belong together: sigmoid(e^scale cos + bias), Zhai et al. 2023.

    (arXiv:2303.15343.) The checkpoint is an open_clip model with a logit bias:
    `siglip_score:ViT-SO400M-16-SigLIP2-384/webli`.
    """

    family = "siglip_score"

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        clip = load_clip(self.checkpoint)
        if clip.model.logit_bias is None:
            raise CheckpointError(f"{self.checkpoint} has no logit bias; siglip_score accepts models trained as SigLIP")
        logits = clip.model.logit_scale.exp().item() * clip.cosines(pictures, prompts) + clip.model.logit_bias.item()
        return logits.double().sigmoid().numpy()


class HpsV21(ModelScore):
    """Human Preference Score v2.1: the cosine of picture and prompt by a tuned ViT-H-14, mostly 0.2 to 0.35.

    Wu et al. 2023 (arXiv:2306.09341), github.com/tgxs002/HPSv2. As there the longest side is scaled to 224 and the rest
    is padded with black; here the scaled picture is rounded to 8 bits. The checkpoint is HPS_v2.1_compressed.pt of
    xswu/HPSv2 when not given; a copy is named `hps_v2.1:ViT-H-14:/weights/HPS_v2.1_compressed.pt`.
    """

    family = "hps_v2.1"
    scale = 0.15
    worst = -1.0

    def __init__(self, checkpoint: str = ""):
        super().__init__(checkpoint)
        if checkpoint:
            check_clip(checkpoint)
        self.checkpoint = checkpoint

    def _clip(self) -> Clip:
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        checkpoint = self.checkpoint or f"ViT-H-14:{download('xswu/HPSv2', 'HPS_v2.1_compressed.pt')}"
        return load_clip(checkpoint, resize_mode="longest", mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return self._clip().cosines(pictures, prompts).numpy()


class PickScore(ModelScore):
    """PickScore v1: e^scale cos of picture and prompt by a tuned CLIP-H, mostly 17 to 24. Kirstain et al. 2023.

    (arXiv:2305.01569), github.com/yuvalkirstain/PickScore. The checkpoint is a transformers CLIPModel, by default
    yuvalkirstain/PickScore_v1 with the processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K; a folder brings its own.
    """

    family = "pick_score"
    scale = 7.0

    def __init__(self, checkpoint: str = ""):
        super().__init__(checkpoint)
        self.checkpoint = checkpoint or "yuvalkirstain/PickScore_v1"
        self.processor = checkpoint or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    @property
    def worst(self) -> float:
        return -self._model().logit_scale.exp().item()

    def _model(self):
        from transformers import CLIPModel

        return load_pretrained(CLIPModel, self.checkpoint)

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        from transformers import CLIPProcessor

        model, processor = self._model(), load_processor(CLIPProcessor, self.processor, backend="pil")

        def cosines(batch: Sequence[tuple[Image.Image, str]]) -> torch.Tensor:
            inputs = processor(
                images=[picture for picture, _ in batch],
                text=[prompt for _, prompt in batch],
                padding="max_length",
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(device(), model.dtype)
            output = model(**inputs)
            images, texts = (normalize(e.float(), dim=-1) for e in (output.image_embeds, output.text_embeds))
            return (images * texts).sum(dim=-1)

        scale = model.logit_scale.exp().item()
        return scale * in_batches(cosines, list(zip(pictures, prompts, strict=True))).numpy()
