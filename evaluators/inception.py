"""The Inception network of FID, from the weights of its authors as torch-fidelity and pytorch-fid publish them."""

from collections.abc import Sequence
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from .batches import in_batches, of_equal_size
from .checkpoints import CheckpointError, device, load_state
from .distances import Embed

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


def load_inception(where: str = URL) -> Embed:
    """What `fid` embeds by: pictures to 2048 values each, float32 `(n, 2048)` on the CPU.

    `where` is a file or URL of the weights, `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity or
    `pt_inception-…` of pytorch-fid, downloaded when not given. They run in torch-fidelity's network, which scales
    pictures as TensorFlow did, in float32 also on a GPU. Raises CheckpointError when they cannot be read or do not fit,
    and where torch-fidelity is not installed.
    """
    network = _network(where)

    def embed(pictures: Sequence[Image.Image]) -> torch.Tensor:
        def vectors(batch: Sequence[int]) -> torch.Tensor:
            pixels = torch.from_numpy(np.stack([np.asarray(pictures[i].convert("RGB")) for i in batch]))
            return network(pixels.permute(0, 3, 1, 2).to(device()))[0]  # (batch, 2048)

        found = torch.empty(len(pictures), 2048)
        for group in of_equal_size(pictures):
            found[group] = in_batches(vectors, group)
        return found

    return embed


@cache
def _network(where: str) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise CheckpointError(
            "fid needs torch-fidelity, which is not installed: pip install 'blocktune[fid]'"
        ) from None
    weights = BytesIO()  # it reads a file by pickle: of one that was read without, only tensors are left
    torch.save(load_state(where), weights)
    weights.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], weights)
    except (RuntimeError, TypeError) as error:
        told = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint is {where!r}, which is not of FID's Inception: {told}") from None
    return network.to(device())
