"""Timing what a GPU does."""

from collections.abc import Callable

import torch

# more than the second-level cache of any GPU; filled four times, it takes one about a millisecond, in which a call is queued
FLUSH_BYTES = 2**30


def measure_milliseconds(function: Callable[[], object], device: torch.device | str) -> float:
    """Time of the kernels that one call launches, with cold caches and without what the host takes to launch them."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    for _ in range(4):
        flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
