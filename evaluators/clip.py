"""CLIP and its kin through open_clip: pictures and texts as unit vectors.

A model is named as `ARCHITECTURE/TAG` (ViT-B-32/openai), `ARCHITECTURE:FILE` (ViT-H-14:/weights/model.pt), or with
open_clip's own `hf-hub:ORG/NAME` and `local-dir:FOLDER`. Weights that were trained with QuickGELU are run with it: for
27 of its tags, ViT-B-32/openai among them, open_clip 3.3 builds a model with another activation and only warns. A file
does not tell; name the architecture that fits (ViT-B-32-quickgelu for the weights of OpenAI).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from torchvision.transforms import Compose

from .batches import in_batches
from .checkpoints import CheckpointError, device, precision

_PIXELS = 32 * 224**2  # at a time on a GPU, which small pictures would leave waiting; a CPU has smaller caches
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class Clip:
    """A model with its own picture transform and tokenizer; longer texts are cut to the model's context."""

    model: Any
    transform: Any
    tokenizer: Any

    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Unit vectors of RGB pictures, float32 `(n, dim)` on the CPU."""
        *steps, _, standardize = self.transform.transforms  # one before the last makes floats of bytes
        place: Any = Compose(steps)
        placed = [np.asarray(place(picture)) for picture in pictures]  # (h, w, 3) each

        def embed(batch: Sequence[np.ndarray]) -> torch.Tensor:
            # floats on the device and of all at once: bytes are a quarter of what has to get there
            pixels = torch.from_numpy(np.stack(batch)).to(device()).permute(0, 3, 1, 2).contiguous()  # (batch, 3, h, w)
            return normalize(self.model.encode_image(standardize(pixels / 255).to(precision())).float(), dim=-1)

        many = _PIXELS // placed[0][..., 0].size if device().type == "cuda" else 0
        return in_batches(embed, placed, max(32, many))

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors of texts, float32 `(n, dim)` on the CPU."""

        def embed(batch: Sequence[str]) -> torch.Tensor:
            tokens = self.tokenizer(list(batch)).to(device())  # (batch, context)
            return normalize(self.model.encode_text(tokens).float(), dim=-1)

        different = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # a prompt comes once per seed
        return in_batches(embed, list(different), 128)[[different[text] for text in texts]]

    def cosines(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        """Cosine of each picture with its text, float32 `(n,)`."""
        return (self.images(pictures) * self.texts(texts)).sum(dim=-1).clamp(-1, 1)


def check_clip(name: str) -> None:
    """Raise CheckpointError unless `name` has the form of a model and its tag or file is known; nothing is loaded."""
    _arguments(name)


def load_clip(name: str, **preprocessing: Any) -> Clip:
    """The model of that name, loaded once; `preprocessing` (mean, std, resize_mode) overrides its own transform.

    Raises CheckpointError when the weights cannot be had or do not fit the architecture.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    of_file = _of_file(name, preprocessing)
    model = _model(name)
    config = PreprocessCfg(**{**model.visual.preprocess_cfg, **of_file, **preprocessing})
    tokenizer = open_clip.get_tokenizer(_arguments(name)["model_name"])
    return Clip(model, image_transform_v2(config, is_train=False), tokenizer)


@cache
def _model(name: str) -> Any:
    import open_clip

    arguments = _arguments(name)
    name_of_precision = "fp32" if precision() == torch.float32 else "fp16"
    try:
        with device():  # open_clip fills a model by chance before it loads the weights: a GPU takes no time for that
            model = open_clip.create_model(
                **arguments, precision=name_of_precision, device=device(), require_pretrained=True
            )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError, ValueError, AssertionError, UnpicklingError) as error:
        sentence = " ".join(str(error).split())[:200]
        raise CheckpointError(f"clip model is {name!r}, which cannot be loaded: {sentence}") from None
    return model.eval()


def _arguments(name: str) -> dict[str, Any]:
    """What open_clip's create_model is called with."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    if name.startswith(("hf-hub:", "local-dir:")):
        return {"model_name": name}
    architecture, kind, weights = _parts(name)
    if architecture not in open_clip.list_models():
        raise CheckpointError(f"clip model is {name!r}; accepted: ARCHITECTURE/TAG, as ViT-B-32/openai")
    if kind == ":":
        if not Path(weights).is_file():
            raise CheckpointError(f"clip model is {name!r}; accepted after {architecture}: a file that is there")
        return {"model_name": architecture, "pretrained": weights}
    published = get_pretrained_cfg(architecture, weights)
    if not published:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
        raise CheckpointError(f"clip model is {name!r}; accepted after {architecture}/: {tags}")
    quick = published.get("quick_gelu", False)
    return {"model_name": architecture, "pretrained": weights, "force_quick_gelu": quick}


def _parts(name: str) -> tuple[str, str, str]:
    """Architecture, "/" before a tag or ":" before a file, and that."""
    end = min((at for at in (name.find("/"), name.find(":")) if at >= 0), default=len(name))
    return name[:end], name[end : end + 1], name[end + 1 :]


def _of_file(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The transform for weights from a file: what all tags of the architecture share, for a file does not tell."""
    from open_clip import list_pretrained_tags_by_model
    from open_clip.pretrained import get_pretrained_cfg

    architecture, kind, _ = _parts(name)
    published = [get_pretrained_cfg(architecture, tag) for tag in list_pretrained_tags_by_model(architecture)]
    if kind == "/" or not published:
        return {}
    transforms = [{key: config[key] for key in _PREPROCESSING} for config in published]
    if any(transform != transforms[0] for transform in transforms):
        if {"mean", "std"} <= given.keys():
            return {}
        raise CheckpointError(
            f"clip model is {name!r}, whose tags differ in their transforms; accepted: local-dir:FOLDER, with its own"
        )
    return transforms[0]
