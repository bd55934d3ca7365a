"""The transfer of a tile between memory and shared memory: the lines of memory, the instructions and the passes over shared memory.

Every count is an average over the tiles of a map: a location outside the map costs instructions, but no memory.
"""

import math
from functools import lru_cache
from typing import NamedTuple

from .geometry import Halo, Reach, Tile, TileProblem, power_of_two
from .limits import REGISTER_BYTES, WARP_SIZE

# bytes of a line of memory, and of shared memory that one wavefront moves (CUDA programming guide)
LINE_BYTES = 128
# bytes of a sector, the part of a line that memory reads and writes as a whole
SECTOR_BYTES = 32
# bytes of the widest load of a thread, which are also those of a cheap asynchronous copy, and of the narrowest copy (PTX ISA, cp.async)
WIDEST_LOAD, NARROWEST_COPY = 16, 4
# logits in one line of memory if channels_last: those of a tile without sub-pixels, and those that the sources of a tile gather
LOGITS_PER_LINE, LOGITS_PER_GATHER = 4, 8
# weights in one line of memory that the sources of a tile gather, by the emulator
WEIGHTS_PER_GATHER = 12


class Transfer(NamedTuple):
    """The transfer of a block of features between memory and shared memory."""

    lines: float
    instructions: float
    copies: float
    passes: float


def count_transfer(
    problem: TileProblem,
    tile: Tile,
    last: bool,
    seen: tuple[float, float],
    padded: int,
    channels: int,
    width: int,
    align: int,
    scale: int,
) -> Transfer:
    """Return the transfer of `channels` channels of a block of `padded` locations, `width` in a row, of which rows x cols are `seen`.

    `last` says whether channels are the fastest axis. A cell of the map has `scale` locations in a row.
    """
    rows, cols = seen
    size, threads = problem.element_size, WARP_SIZE * tile.num_warps
    present = min(channels, problem.channels)
    if last:
        lines = _run_lines(rows * cols, present * size)
    else:
        lines = present * _plane_lines(rows, cols * size, problem.width * scale * size)
    # the compiler knows the alignment of the first pixel of a row, and of the others by the width of the block
    vector = align if last else math.gcd(width, align)
    vector = max(1, min(vector, padded * channels // threads))
    instructions = max(padded * channels / vector / WARP_SIZE, tile.num_warps)
    small = tile.num_stages > 1 and NARROWEST_COPY <= vector * size < WIDEST_LOAD
    # a bank of shared memory is as wide as a register: a thread that stores less leaves the rest unused
    passes = count_lines(problem, padded * channels) * max(1.0, REGISTER_BYTES / (vector * size))
    return Transfer(lines, instructions, instructions if small else 0, passes)


def _run_lines(runs: float, run_bytes: float) -> float:
    """Return the lines of memory that runs of bytes touch, at any alignment unless they are whole lines."""
    return runs * (run_bytes / LINE_BYTES if run_bytes % LINE_BYTES == 0 else 1 + (run_bytes - 1) / LINE_BYTES)


def _plane_lines(rows: float, row_bytes: float, pitch: float) -> float:
    """Return the lines of memory that rows of bytes touch, which begin `pitch` bytes after each other and may share lines."""
    # a mean number of rows may be below 1
    return min(_run_lines(rows, row_bytes), 1 + (max(0.0, rows - 1) * pitch + row_bytes - 1) / LINE_BYTES)


def stored_partials(
    problem: TileProblem, last: bool, seen: tuple[float, float], channels: int, scale: int, step: int, lead: int = 0
) -> float:
    """Return the sectors that a block of features fills in part, where it is stored.

    The arguments are those of `count_transfer`. The first columns of neighbouring tiles are `step` locations apart, and lie `lead`
    locations before their cells.
    """
    rows, cols = seen
    size, present = problem.element_size, min(channels, problem.channels)
    if last:
        return _partial_sectors(rows * cols, present * size, math.gcd(channels, problem.channels) * size)
    return present * _plane_partials(rows, cols * size, problem.width * scale * size, math.gcd(step, lead) * size)


def logit_partials(problem: TileProblem, tile: Tile) -> float:
    """Return the sectors that the gradient to the logits of a tile fills in part."""
    spec, size = problem.spec, problem.element_size
    if problem.channels_last:
        # the taps of a target are apart
        return logit_lines(problem, tile)
    rows, cols = cells_seen(problem, tile)
    return spec.taps * spec.up**2 * _plane_partials(rows, cols * size, problem.width * size, tile.cells_w * size)


def _plane_partials(rows: float, row_bytes: float, pitch: int, step: int) -> float:
    """Return the sectors that rows of bytes fill in part, which begin `pitch` bytes after each other; tiles are `step` bytes apart."""
    if row_bytes == pitch:
        return _partial_sectors(1, rows * pitch, pitch)
    return _partial_sectors(rows, row_bytes, math.gcd(pitch, step))


def _partial_sectors(runs: float, run_bytes: float, starts: int) -> float:
    """Return the sectors that runs of bytes fill in part; a run begins at any multiple of `starts` bytes."""
    aligned = math.gcd(starts, SECTOR_BYTES)
    # both ends of a run may lie inside a sector, and a short run lies in one or two
    return runs * min(2 * (1 - aligned / SECTOR_BYTES), 1 + max(0.0, run_bytes - aligned) / SECTOR_BYTES)


def count_lines(problem: TileProblem, elements: float) -> float:
    """Return the lines that elements of features fill."""
    return elements * problem.element_size / LINE_BYTES


def logit_lines(problem: TileProblem, tile: Tile) -> float:
    """Return the lines of the logits of a tile."""
    spec, size = problem.spec, problem.element_size
    if problem.channels_last and spec.up == 1:
        rows, cols = targets_seen(problem, tile)
        return spec.taps * rows * cols / LOGITS_PER_LINE
    rows, cols = cells_seen(problem, tile)
    if problem.channels_last:
        # a warp accesses a run of some taps of every cell of a tile
        subs = spec.up**2
        places = power_of_two(tile.cells_h * tile.cells_w * subs) // math.gcd(subs, WIDEST_LOAD // size)
        taps = min(spec.taps, max(1, WARP_SIZE // places))
        return spec.taps / taps * rows * cols * _run_lines(1, taps * subs * size)
    return spec.taps * spec.up**2 * _plane_lines(rows, cols * size, problem.width * size)


def halo_seen(problem: TileProblem, tile: Tile, window: Halo) -> tuple[float, float]:
    """Return the mean rows and columns, in the map, of the sources that the targets of a tile read."""
    down, radius = problem.spec.down, problem.spec.kernel_size // 2
    rows = _mean_seen(problem.height, tile.cells_h, down, radius, window.height)
    return rows, _mean_seen(problem.width, tile.cells_w, down, window.lead, window.width)


def targets_seen(problem: TileProblem, tile: Tile) -> tuple[float, float]:
    """Return the mean rows and columns, in the map, of the targets of a tile."""
    rows, cols = cells_seen(problem, tile)
    return rows * problem.spec.up, cols * problem.spec.up


def reach_seen(problem: TileProblem, tile: Tile, reached: Reach) -> tuple[float, float]:
    """Return the mean rows and columns, in the map, of the targets that read the sources of a tile."""
    up = problem.spec.up
    rows = _mean_seen(problem.height, tile.cells_h, up, reached.before, reached.height)
    return rows, _mean_seen(problem.width, tile.cells_w, up, reached.lead, reached.width)


def sources_seen(problem: TileProblem, tile: Tile) -> tuple[float, float]:
    """Return the mean rows and columns, in the map, of the sources of a tile."""
    rows, cols = cells_seen(problem, tile)
    return rows * problem.spec.down, cols * problem.spec.down


def cells_seen(problem: TileProblem, tile: Tile) -> tuple[float, float]:
    """Return the mean rows and columns of cells of a tile that lie in the map."""
    return _mean_seen(problem.height, tile.cells_h, 1, 0, tile.cells_h), _mean_seen(problem.width, tile.cells_w, 1, 0, tile.cells_w)


@lru_cache(maxsize=4096)
def _mean_seen(cells: int, tile_cells: int, step: int, lead: int, extent: int) -> float:
    """Return the mean over tiles of the part of an extent that lies in a map of `cells` cells with `step` locations each.

    The extent of a tile begins `lead` locations before its first cell.
    """
    starts = range(-lead, cells * step - lead, tile_cells * step)
    return sum(max(0, min(start + extent, cells * step) - max(start, 0)) for start in starts) / len(starts)
