"""Evaluator `lpips`: how different a picture looks from its reference, to be minimised; 0 for equal pictures."""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

from .batches import in_batches, of_equal_size
from .checkpoints import CheckpointError, device, load_state
from .model_score import ModelFidelity

_HEADS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth"
_ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
_TAPS = (1, 4, 7, 9, 11)  # the five ReLUs of AlexNet's features
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]
_SMALLEST = 32  # pixels; less leaves the last layers nothing


class Lpips(ModelFidelity):
    """LPIPS v0.1 on AlexNet, Zhang et al. 2018 (arXiv:1801.03924), github.com/richzhang/PerceptualSimilarity.

    Features of five layers are scaled to unit length at each place; their squared differences are weighted per channel,
    averaged over places and summed over layers. Pictures keep their size; those with
    a side below 32 pixels get the worst value. In float32 also on a GPU. The checkpoint is
    `HEADS with ALEXNET`, files or URLs: the weights of the lpips package, and torchvision's AlexNet.
    """

    family = "lpips"
    direction: Literal["maximize", "minimize"] = "minimize"

    def __init__(self, checkpoint: str = ""):
        super().__init__(checkpoint)
        heads, _, alexnet = checkpoint.partition(" with ")
        self._heads, self._alexnet = heads or _HEADS, alexnet or _ALEXNET

    @property
    def worst(self) -> float:
        # unit vectors without negative parts are at a squared distance of 2 at most
        return sum(2 * head.max().item() for head in _load_heads(self._heads))

    def compare(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> np.ndarray:
        heads, alexnet = _load_heads(self._heads), _load_alexnet(self._alexnet)

        def distance(batch: Sequence[tuple[Image.Image, Image.Image]]) -> torch.Tensor:
            pixels = torch.stack([to_tensor(picture) for pair in zip(*batch, strict=True) for picture in pair])
            shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (_SHIFT, _SCALE))
            features = ((2 * pixels - 1 - shift) / scale).to(device())  # (2 * batch, 3, h, w)
            total = torch.zeros(len(batch), device=device())
            layers = iter(heads)
            for index, layer in enumerate(alexnet):
                features = layer(features)
                if index in _TAPS:
                    unit = features / (features.norm(dim=1, keepdim=True) + 1e-10)
                    first, second = unit.chunk(2)  # pictures, references
                    total += ((first - second) ** 2 * next(layers)).sum(dim=1).mean(dim=(1, 2))
            return total

        scores = np.full(len(pictures), self.worst)
        for group in of_equal_size(pictures):
            if min(pictures[group[0]].size) < _SMALLEST:
                continue
            scores[group] = in_batches(distance, [(pictures[i], references[i]) for i in group], size=16).numpy()
        return scores


@cache
def _load_heads(where: str) -> list[torch.Tensor]:
    """Weights per channel of each layer, `(channels, 1, 1)`, none negative."""
    state = load_state(where)
    keys = [f"lin{layer}.model.1.weight" for layer in range(len(_TAPS))]
    if state.keys() != set(keys):
        raise CheckpointError(f"heads {where} hold {', '.join(sorted(state))}; accepted: {', '.join(keys)}")
    return [state[key][0].float().to(device()) for key in keys]


@cache
def _load_alexnet(where: str) -> nn.Sequential:
    from torchvision.models import alexnet

    with torch.device("meta"):
        features = alexnet().features
    prefix = "features."
    state = {key.removeprefix(prefix): value for key, value in load_state(where).items() if key.startswith(prefix)}
    try:
        features.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"alexnet {where} does not fit: {' '.join(str(error).split())[:200]}") from None
    return features[: max(_TAPS) + 1].float().eval().to(device())
