"""Timing of calls in interleaved rounds, so that a disturbance of the machine affects all calls equally."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from ...kernels.gpu.clock import measure_milliseconds

Key = TypeVar("Key")


def time_call(function: Callable[[], object], device: str) -> float:
    """Measure the milliseconds of one call; on a GPU those of its kernels alone."""
    if torch.device(device).type == "cuda":
        return measure_milliseconds(function, device)
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def time_wall(function: Callable[[], object], device: str) -> float:
    """Measure the milliseconds of one call until its results are there; on a GPU, the host's time to launch the kernels is included."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        torch.cuda.synchronize(device)
    else:
        start = time.perf_counter()
        function()
    return (time.perf_counter() - start) * 1e3


def time_processor(function: Callable[[], object], device: str) -> float:
    """Measure the milliseconds for which all threads of this process occupy a processor in one call."""
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3


# the times that a bench can give: until the results are there; of the processor, which other work on the machine hardly changes; of the
# kernels alone on a GPU
CLOCKS = {"wall": time_wall, "processor": time_processor, "kernels": time_call}


def time_in_turns(
    calls: Mapping[Key, Callable[[], object]],
    device: str,
    rounds: int,
    *,
    clock: Callable[[Callable[[], object], str], float] = time_call,
    seconds: float = math.inf,
    at_least: int = 0,
    warm_below_ms: float = 0,
) -> dict[Key, list[float]]:
    """Time every call once in each round.

    Args:
        calls: functions by key.
        device: the device of their tensors.
        rounds: the largest number of times that each call is timed.
        clock: measures the milliseconds of a function on a device.
        seconds: a call is not timed again after its times sum to this and it was timed `at_least` times.
        at_least: see `seconds`.
        warm_below_ms: a call whose last time is below this is repeated before it is timed, because the previous call in turn has
            replaced the content of the caches.

    Returns:
        Milliseconds by key, in the order of the rounds.

    Raises:
        ValueError: there is no round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    times = defaultdict[Key, list[float]](list)
    for _ in range(rounds):
        for key, call in calls.items():
            taken = times[key]
            if len(taken) >= at_least and sum(taken) >= seconds * 1e3:
                continue
            if taken and taken[-1] < warm_below_ms:
                call()
            taken.append(clock(call, device))
    return times


def quantile(times: Sequence[float], share: float) -> float:
    """Return the time that a share of the times does not exceed, without interpolation: a share of 0.5 gives the median."""
    return sorted(times)[round(share * (len(times) - 1))]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval between two of the values that contains the median of their distribution with this confidence.

    The interval is the narrowest that is symmetric in ranks. The whole range of fewer than six values has less confidence than 95 %.
    """
    ordered, n = sorted(values), len(values)
    # the probability that fewer than `rank` of n values lie below the median
    below = [sum(math.comb(n, i) for i in range(rank)) / 2**n for rank in range(1, n // 2 + 1)]
    skipped = sum(2 * probability <= 1 - confidence for probability in below[1:]) if below else 0
    return ordered[skipped], ordered[n - 1 - skipped]
