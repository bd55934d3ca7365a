"""The time that kernels take on a GPU."""

from collections.abc import Callable

import torch

# larger than the second-level cache of any GPU; the host queues the call during the millisecond that four fills take
FLUSH_BYTES = 2**30


def measure_milliseconds(function: Callable[[], object], device: torch.device | str) -> float:
    """Return the milliseconds of the kernels that one call launches, with cold caches and without the host's time to launch them."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    for _ in range(4):
        flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
