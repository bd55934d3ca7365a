"""Times of calls, measured in turns, so that a disturbance of the machine reaches all of them alike."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from ...kernels.gpu.clock import measure_milliseconds

Key = TypeVar("Key")


def time_call(function: Callable[[], object], device: str) -> float:
    """Milliseconds of one call; on a GPU those of its kernels alone."""
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
    """Time every call once a round.

    Args:
        rounds: upper bound of the times of each call.
        seconds: a call that has taken longer in all is timed no more, after `at_least` times.
        warm_below_ms: a call whose last time is below this is called once more before it is timed, because the call before it in turn
            has emptied the caches.

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
    """The time that `share` of the times do not exceed; 0.5 is the median (of an even number, the one above or below the middle)."""
    return sorted(times)[round(share * (len(times) - 1))]
