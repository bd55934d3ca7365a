"""The time that kernels take on a GPU."""

from collections.abc import Callable

import torch

# larger than the second-level cache of any GPU; the host queues the call while the GPU fills this memory a number of times
FLUSH_BYTES = 2**30
FEWEST_FILLS, MOST_FILLS = 4, 64


def measure_milliseconds(function: Callable[[], object], device: torch.device | str) -> float:
    """Return the milliseconds of the kernels that one call launches, with cold caches and without the host's time to launch them.

    The call is repeated with more fills before it, if the GPU may have waited for the host. A call of 16 ms or more on the host includes
    such waits.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    fills = FEWEST_FILLS
    while True:
        for _ in range(fills):
            flush.zero_()
        start.record()
        function()
        end.record()
        # the GPU has begun before the host has queued the whole call
        waited = start.query()
        end.synchronize()
        if not waited or fills >= MOST_FILLS:
            return start.elapsed_time(end)
        fills *= 2
