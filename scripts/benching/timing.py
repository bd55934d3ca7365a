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


def time_in_turns(
    calls: Mapping[Key, Callable[[], object]],
    device: str,
    rounds: int,
    *,
    seconds: float = math.inf,
    at_least: int = 0,
    warm_below_ms: float = 0,
) -> dict[Key, list[float]]:
    """Time every call once in each round.

    Args:
        calls: functions by key.
        device: the device of their tensors.
        rounds: the largest number of times that each call is timed.
        seconds: a call is not timed again after its times sum to this and it was timed `at_least` times.
        at_least: see `seconds`.
        warm_below_ms: a call whose last time is below this is repeated before it is timed, because the previous call in turn has
            replaced the content of the caches.

    Returns:
        Milliseconds by key, in the order of the rounds.
    """
    times = defaultdict[Key, list[float]](list)
    for _ in range(rounds):
        for key, call in calls.items():
            taken = times[key]
            if len(taken) >= at_least and sum(taken) >= seconds * 1e3:
                continue
            if taken and taken[-1] < warm_below_ms:
                call()
            taken.append(time_call(call, device))
    return times


def quantile(times: Sequence[float], share: float) -> float:
    """Return the time that a share of the times does not exceed, without interpolation: a share of 0.5 gives the median."""
    return sorted(times)[round(share * (len(times) - 1))]
