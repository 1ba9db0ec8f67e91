"""Evaluators `aesthetic_v1` and `aesthetic_v2`: LAION's predictors of how people rate a picture, about 1 to 10.

Both are affine in the unit CLIP vector of the picture and never read the prompt. The checkpoint is `HEAD with CLIP`: a
file or URL of the head, and an open_clip model, `ViT-L-14/openai` when not given.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image

from .checkpoints import CheckpointError, load_state
from .clip import check_clip, load_clip
from .model_score import ModelScore

MLP_LAYERS = ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7.")  # dropout at the numbers between


class _Aesthetic(ModelScore):
    scale = 9.0
    head: str  # where the published head is
    layers: tuple[str, ...]  # its linear layers in order, as the state dict names them

    def __init__(self, checkpoint: str = ""):
        super().__init__(checkpoint)
        head, _, clip = checkpoint.partition(" with ")
        self._head = head or self.head
        self._clip = clip or "ViT-L-14/openai"
        check_clip(self._clip)

    @property
    def worst(self) -> float:
        weight, bias = _affine(self._head, self.layers)
        return float(bias - weight.norm())  # of any unit vector

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        vectors = load_clip(self._clip).images(pictures).double()  # (n, dim)
        weight, bias = _affine(self._head, self.layers)
        if len(weight) != vectors.shape[1]:
            raise CheckpointError(
                f"head {self._head} takes vectors of {len(weight)}; accepted: {vectors.shape[1]}, as {self._clip} gives"
            )
        return (vectors @ weight + bias).numpy()


class AestheticV1(_Aesthetic):
    """LAION aesthetic predictor v1, one linear layer; github.com/LAION-AI/aesthetic-predictor."""

    family = "aesthetic_v1"
    head = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth"
    layers = ("",)


class AestheticV2(_Aesthetic):
    """LAION aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE), five linear layers without activations.

    github.com/christophschuhmann/improved-aesthetic-predictor. Dropout between the layers is for training only.
    """

    family = "aesthetic_v2"
    head = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
    layers = MLP_LAYERS


@cache
def _affine(head: str, layers: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return fold(load_state(head), layers, head)


def fold(state: dict[str, torch.Tensor], layers: tuple[str, ...], where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear layers without activations between, which are one: its weight `(dim,)` and bias `()`, float64.

    Raises CheckpointError, naming `where` they are from, when `state` holds anything but `layers`.
    """
    expected = {layer + part for layer in layers for part in ("weight", "bias")}
    if state.keys() != expected:
        raise CheckpointError(f"head {where} holds {', '.join(sorted(state))}; accepted: {', '.join(sorted(expected))}")
    weight, bias = state[layers[0] + "weight"].double(), state[layers[0] + "bias"].double()
    for layer in layers[1:]:
        matrix = state[layer + "weight"].double()
        weight, bias = matrix @ weight, matrix @ bias + state[layer + "bias"].double()
    return weight[0], bias[0]
