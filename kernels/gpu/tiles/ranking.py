"""The ranking of tiles by speed: a pure function of the shape, data type and memory format of a problem and the capability of the device.

The tiles that fit (limits.py) are ranked by their predicted time (time_model.py). A tile in a table (tables.py) takes precedence.
"""

import math
from functools import lru_cache
from itertools import islice

from .geometry import KernelName, Tile, TileProblem, as_read
from .limits import fitting_tiles, may_transpose, wide_tiles
from .resources import MOST_REGISTERS, Resources, estimate_resources
from .time_model import count_resident, estimate_time, transposition_microseconds, weighing_microseconds, writing_microseconds

# the kernels of a backward pass: one for both gradients, or one for each
TOGETHER: tuple[KernelName, ...] = ("backward",)
SEPARATE: tuple[KernelName, ...] = ("logit_gradient", "source_gradient")
# a limit of registers that is this much below the estimate makes a kernel spill too many of them
MOST_OVER_LIMIT = 1.3
# predicted time without a copy of features, over that with it, from which on a copy is made: more than the error of the model
LEAST_ADVANTAGE = 1.1
# leading bits of the sizes that share a ranking, and the tiles of it that are rated for a size
LEADING_BITS, RATED_TILES = 3, 24


@lru_cache(maxsize=4096)
def rank_tiles(kernel: KernelName, problem: TileProblem) -> tuple[Tile, ...]:
    """Return the tiles that fit a kernel, the least predicted time first; none if the window is too large."""
    times = {tile: rated_time(kernel, problem, tile) for tile in fitting_tiles(kernel, problem)}
    return tuple(sorted(times, key=lambda tile: (times[tile], tile)))


def rated_time(kernel: KernelName, problem: TileProblem, tile: Tile, resources: Resources | None = None) -> float:
    """Return the predicted microseconds of a kernel and of the launch before it, and more for the memory of a copy of the features."""
    time = estimate_time(kernel, problem, tile, resources).total
    if as_read(kernel, problem, tile).weighed:
        time += weighing_microseconds(problem)
    return (time + transposition_microseconds(problem)) * LEAST_ADVANTAGE if tile.transposed else time


@lru_cache(maxsize=4096)
def choose_tile(kernel: KernelName, problem: TileProblem) -> Tile | None:
    """Return a tile of about the least predicted time, or None if the window is too large for the banded kernel.

    A ranking takes tens of milliseconds, and a detector meets a new size at every image. Sizes near each other therefore share a ranking,
    and only its first tiles are rated for the size itself.
    """
    tiles = (tile for tile in rank_tiles(kernel, round_sizes(problem)) if not tile.transposed or may_transpose(kernel, problem))
    return min(islice(tiles, RATED_TILES), key=lambda tile: (rated_time(kernel, problem, tile), tile), default=None)


def round_sizes(problem: TileProblem) -> TileProblem:
    """Return the problem with the height, width and batch rounded to a few leading bits."""
    return problem._replace(height=_rounded(problem.height), width=_rounded(problem.width), batch=_rounded(problem.batch))


def _rounded(size: int) -> int:
    step = 1 << max(0, size.bit_length() - LEADING_BITS)
    return (size + step // 2) // step * step


def choose_backward(problem: TileProblem) -> tuple[KernelName, ...]:
    """Return the kernels that compute both gradients in the least predicted time: one for both, or one for each."""
    times: dict[KernelName, float] = {}
    for kernel in (*TOGETHER, *SEPARATE):
        if tile := choose_tile(kernel, problem):
            times[kernel] = rated_time(kernel, problem, tile)
    apart = sum(times.get(kernel, math.inf) for kernel in SEPARATE)
    if not problem.channels_last:
        # the launch of the gradient to the logits writes the weights for the other one
        apart -= weighing_microseconds(problem) - writing_microseconds(problem)
    return TOGETHER if "backward" in times and times["backward"] <= apart else SEPARATE


def rank_wide_tiles(kernel: KernelName, problem: TileProblem) -> list[Tile]:
    """Return the tiles that a search by measurement tries, the fastest by the model first.

    Their registers and shared memory are estimated, so that some of them cannot run.
    """
    times = {}
    for tile in wide_tiles(kernel, problem):
        registers, shared = estimate_resources(kernel, problem, tile)
        # programs that walk were made for their limit
        walks = kernel == "source_gradient" and tile.steps > 1
        limited = tile.max_registers < MOST_REGISTERS and not walks
        if registers >= MOST_REGISTERS or (limited and not tile.max_registers < registers <= MOST_OVER_LIMIT * tile.max_registers):
            continue
        resources = Resources(min(registers, tile.max_registers), shared)
        if count_resident(problem.capability, *resources, tile.num_warps):
            times[tile] = rated_time(kernel, problem, tile, resources)
    return sorted(times, key=lambda tile: (times[tile], tile))
