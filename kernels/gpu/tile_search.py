"""The search for the fastest tile of a problem: by measured times on a GPU, or by counts of compiled instructions without one."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import triton

from .assembly import compile_launch, read_assembly
from .clock import measure_milliseconds
from .tile_geometry import Direction, Tile
from .tile_ranking import rank_tiles
from .training_step import TrainingStep

# measurements of a tile; the result is their median
MEASUREMENTS = 21


def time_tiles(step: TrainingStep, direction: Direction, limit: int) -> Iterator[tuple[float, Tile]]:
    """Yield the median milliseconds of the `limit` highest-ranked tiles on the device of the step, except tiles that it cannot run."""
    tiles = rank_tiles(direction, step.problem())[:limit]
    launches = [launch for tile in tiles for launch in step.build_launches(direction, tile=tile)]
    target = triton.runtime.driver.active.get_current_target()
    with ThreadPoolExecutor() as pool:
        kernels = list(pool.map(lambda launch: triton.compile(launch.source(), target, launch.options), launches))
    for tile, launch, kernel in zip(tiles, launches, kernels, strict=True):
        start = functools.partial(launch.start, kernel)
        try:
            yield median(measure_milliseconds(start, step.x.device) for _ in range(MEASUREMENTS)), tile
        except triton.runtime.errors.OutOfResources:
            continue


def count_instructions(step: TrainingStep, direction: Direction, limit: int, capability: int) -> Iterator[tuple[float, Tile]]:
    """Yield millions of warp instructions of the `limit` highest-ranked tiles, except tiles that spill or do not fit.

    Every instruction in the code of a program counts once, also inside loops.

    Args:
        step: tensors, usually on "meta".
        direction: the pass.
        limit: tiles to compile.
        capability: the compute capability to compile for, 80 for 8.0.
    """
    pair = divmod(capability, 10)
    for tile in rank_tiles(direction, step.problem(pair))[:limit]:
        (launch,) = step.build_launches(direction, tile=tile, capability=pair)
        assembly = read_assembly(compile_launch(launch, capability))
        if not assembly.spills and assembly.blocks:
            yield assembly.instructions * launch.num_warps * launch.grid[0] / 1e6, tile
