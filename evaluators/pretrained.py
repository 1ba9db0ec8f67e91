"""Models of transformers, loaded once per process: evaluators that name the same weights share them."""

from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=8)
def load_pretrained(model: str, processor: str, checkpoint: str) -> tuple[Any, Any, torch.device]:
    """Model and processor, by the names of their classes, from a hub id or path; float32, on the device at hand."""
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = getattr(transformers, model).from_pretrained(checkpoint, dtype=torch.float32)
    return made.to(device).eval(), getattr(transformers, processor).from_pretrained(checkpoint), device
