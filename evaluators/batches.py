"""Running a model over any number of rows in batches that fit."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image

T = TypeVar("T")


def each_in_batches(function: Callable[[Sequence[Any]], Iterable[T]], rows: Sequence[Any], size: int = 32) -> list[T]:
    """`function` of `size` rows at a time without gradients, which gives one result per row: all in order.

    When the device's memory runs out the batch is halved, down to one row; then torch.OutOfMemoryError is raised.
    """
    results: list[T] = []
    with torch.inference_mode():
        while len(results) < len(rows):
            batch = rows[len(results) : len(results) + size]
            found = _attempt(function, batch)
            if found is None:
                size = len(batch) // 2
                continue
            results += found
    return results


def in_batches(function: Callable[[Sequence[Any]], torch.Tensor], rows: Sequence[Any], size: int = 32) -> torch.Tensor:
    """The tensors that `function` gives for one row or more, as one of all rows: float32 `(n, …)` on the CPU."""
    return torch.stack(each_in_batches(lambda batch: function(batch).float().cpu(), rows, size))


def _attempt(function: Callable[[Sequence[Any]], Iterable[T]], batch: Sequence[Any]) -> Iterable[T] | None:
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
