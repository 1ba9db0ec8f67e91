"""What a generation costs beside time: floating point operations and peak memory of the GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], Any]) -> int:
    """Floating point operations of `run()`, a multiplication and an addition counted as two.

    Those of matrix products, convolutions and attention, which torch counts; the rest is free here, and so are fused
    modules that it cannot see into (nn.MultiheadAttention without gradients; no transformer of diffusers has one).
    They do not tell the latency: compare policies by `time_runs`.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_memory(run: Callable[[], Any]) -> int:
    """The most bytes that tensors took on the current GPU during `run()`, weights included.

    torch's own count: what its allocator keeps in reserve and the driver's share are not in it. Raises ValueError
    without a GPU, where torch does not count.
    """
    if not torch.cuda.is_available():
        raise ValueError("device is cpu; peak_memory accepts a process that sees a GPU")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
