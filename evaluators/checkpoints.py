"""Weights by name: a path, a URL or a hub id, loaded once per process onto the device at hand.

Half precision on a GPU, float32 on a CPU. Nothing is loaded, and no GPU touched, before the first score is asked for.
"""

from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


class CheckpointError(ValueError):
    """The checkpoint an evaluator names cannot be had, or does not fit it."""


def device() -> torch.device:
    """The first GPU this process sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(half: torch.dtype = torch.float16) -> torch.dtype:
    """`half` on a GPU, float32 on a CPU."""
    return half if device().type == "cuda" else torch.float32


@cache
def load_pretrained(
    model_class: Any, checkpoint: str, half: torch.dtype = torch.float16, unused: tuple[str, ...] = ()
) -> Any:
    """A transformers model in evaluation mode from a hub id or a folder; `half` is its dtype on a GPU.

    Raises CheckpointError when there is no such checkpoint, or when the checkpoint lacks weights of the model other
    than those that begin with `unused`, which the model has and does not compute with.
    """
    try:
        model, info = model_class.from_pretrained(checkpoint, dtype=precision(half), output_loading_info=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint is {checkpoint!r}, which cannot be loaded: {_line(error)}") from None
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(unused))
    if missing:
        raise CheckpointError(
            f"checkpoint {checkpoint!r} lacks {len(missing)} weights of {type(model).__name__}, as {missing[0]}"
        )
    return model.eval().to(device())


@cache
def load_processor(processor_class: Any, checkpoint: str, **options: Any) -> Any:
    """A transformers processor from a hub id or a folder; `backend="pil"` has pictures resized by Pillow.

    Raises CheckpointError when there is none.
    """
    try:
        return processor_class.from_pretrained(checkpoint, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"processor of {checkpoint!r} cannot be loaded: {_line(error)}") from None


def load_state(where: str) -> dict[str, torch.Tensor]:
    """A state dict on the CPU from a file, or from a URL, which is downloaded once. Raises CheckpointError."""
    try:
        if where.startswith("https://"):
            return torch.hub.load_state_dict_from_url(where, map_location="cpu", weights_only=True)
        return torch.load(Path(where).expanduser(), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"checkpoint is {where!r}, which cannot be read: {_line(error)}") from None


def download(repository: str, file: str) -> str:
    """Path of a file of a hub repository, downloaded once. Raises CheckpointError when it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} of {repository} cannot be downloaded: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
