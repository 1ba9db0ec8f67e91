"""Running a model over any number of rows in batches that fit."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image


def in_batches(function: Callable[[Sequence[Any]], torch.Tensor], rows: Sequence[Any], size: int = 32) -> torch.Tensor:
    """`function` of `size` rows at a time without gradients, its results put together: float32 `(n, …)` on the CPU.

    When the device's memory runs out the batch is halved, down to one row; then torch.OutOfMemoryError is raised.
    """
    results = []
    start = 0
    with torch.inference_mode():
        while start < len(rows):
            batch = rows[start : start + size]
            result = _attempt(function, batch)
            if result is None:
                size = len(batch) // 2
                continue
            results.append(result.float().cpu())
            start += len(batch)
    return torch.cat(results)


def _attempt(function: Callable[[Sequence[Any]], torch.Tensor], batch: Sequence[Any]) -> torch.Tensor | None:
    try:
        return function(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()  # not while the exception is alive: its traceback holds the batch's tensors
    return None


def of_equal_size(pictures: Sequence[Image.Image]) -> list[list[int]]:
    """Positions of `pictures` by their size, for models that see pictures at their own size and need them stacked."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, picture in enumerate(pictures):
        groups.setdefault(picture.size, []).append(index)
    return list(groups.values())
