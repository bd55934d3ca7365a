"""The work of a tile, counted from the code of the kernels: instructions, lines of memory, passes over shared memory and products.

Every count is an average over the tiles of a map: a location outside the map costs instructions, but no memory. Nothing here is measured;
tile_time.py turns the counts into microseconds.

A program that walks does the work of its steps, and of the steps above them whose targets read its sources too.

M, P, T: targets, halo and taps of a tile, rounded up to a power of two; S, D: its sources and the targets that read them.
"""

import math
from typing import NamedTuple

from .tile_geometry import KernelName, Tile, TileProblem, Walk, as_read, count_walks, halo, reach, run_alignments, run_vector, walk
from .tile_limits import REGISTER_BYTES, WARP_SIZE, SourceBlocks, operand_terms, source_blocks, walk_targets
from .tile_memory import (
    LINE_BYTES,
    LOGITS_PER_GATHER,
    WEIGHTS_PER_GATHER,
    cells_seen,
    count_lines,
    count_transfer,
    halo_seen,
    logit_lines,
    reach_seen,
    sources_seen,
    targets_seen,
)

# multiply-adds in 16 bits of a multiprocessor in a cycle: by the matrix instruction of a warp, and by that of four warps from 9.0 on
WARP_PRODUCTS, WARPGROUP_PRODUCTS = 1024, 2048
# rows of a product of the instruction of four warps, which must all be there
WARPGROUP_ROWS = 64
# the time of a float32 product over that in 16 bits: three products in TF32 at half the speed
FLOAT32_PRODUCTS = 6


class Work(NamedTuple):
    """The work of all programs of one kind, for each program. Counts of instructions and elements are those of a warp, over all warps."""

    programs: float  # that have channels to compute
    warps: float
    steps: float  # iterations of the loops of a program
    lines: float  # lines of memory that are loaded or stored
    copies: float  # asynchronous copies of fewer than 16 bytes per thread
    passes: float  # passes over shared memory, except those that read the operands of products
    products: float  # cycles of the matrix units
    loads: float  # instructions that load features
    stores: float
    logits: float  # logits that are normalised, or turned into their gradient
    band: float  # weights that the gradient to the features rebuilds
    exchanges: float  # of the weights of a tile between the threads of a warp
    splits: float  # elements of float32 operands that are split into two terms


def count_work(kernel: KernelName, problem: TileProblem, tile: Tile) -> tuple[Work, ...]:
    """Return the work of each kind of program of a kernel: two kinds if it computes both gradients."""
    problem = as_read(kernel, problem, tile)
    if kernel == "forward":
        return (count_forward(problem, tile),)
    if tile.steps > 1:
        return (count_walk(problem, tile),)
    works = []
    if kernel != "source_gradient":
        works.append(count_logit_gradient(problem, tile))
    if kernel != "logit_gradient":
        works.append(count_source_gradient(problem, tile, source_blocks(kernel, problem, tile)))
    return tuple(works)


def count_forward(problem: TileProblem, tile: Tile) -> Work:
    """Return the work of the forward kernel."""
    window = halo(problem.spec, tile.cells_h, tile.cells_w, run_vector(problem, tile, problem.x_align))
    up, down, x_align = problem.spec.up, problem.spec.down, run_alignments(problem, tile)[0]
    last, channels = problem.channels_last, tile.block_c
    seen = halo_seen(problem, tile, window)
    features = count_transfer(problem, tile, problem.x_last, seen, window.p, channels, window.width, x_align, down)
    seen = targets_seen(problem, tile)
    result = count_transfer(problem, tile, last, seen, window.m, channels, window.cols, problem.y_align, up)
    blocks = -(-problem.channels // tile.block_c)
    active = min(tile.split, blocks)
    tall = last and window.rows * window.cols < WARPGROUP_ROWS
    newer = takes_four_warps(problem, tile, window.m if last and not tall else channels)
    band, steps = window.p * window.m, blocks / active
    issued = _issued(tile, steps)
    return Work(
        programs=_tiles(problem, tile) * active,
        warps=tile.num_warps,
        steps=steps,
        lines=steps * (features.lines + result.lines) + logit_lines(problem, tile),
        copies=issued * features.copies,
        passes=issued * features.passes + 2 * steps * count_lines(problem, window.m * tile.block_c) + 2 * count_lines(problem, band),
        products=steps * _product_cycles(problem, band * tile.block_c, newer),
        loads=issued * features.instructions,
        stores=steps * result.instructions,
        logits=window.t * window.m / WARP_SIZE,
        band=0,
        exchanges=window.t * band / WARP_SIZE**2,
        splits=steps * _splits(problem, window.p * tile.block_c + band),
    )


def count_logit_gradient(problem: TileProblem, tile: Tile) -> Work:
    """Return the work of the gradient to the logits."""
    spec = problem.spec
    window = halo(spec, tile.cells_h, tile.cells_w, run_vector(problem, tile, problem.x_align))
    x_align, y_align = run_alignments(problem, tile)
    seen = halo_seen(problem, tile, window)
    features = count_transfer(problem, tile, problem.x_last, seen, window.p, tile.block_c, window.width, x_align, spec.down)
    seen = targets_seen(problem, tile)
    gradients = count_transfer(problem, tile, problem.channels_last, seen, window.m, tile.block_c, window.cols, y_align, spec.up)
    steps = -(-problem.channels // tile.block_c)
    issued = _issued(tile, steps)
    newer = takes_four_warps(problem, tile, window.p)
    logits = window.t * window.m / WARP_SIZE
    return Work(
        programs=_tiles(problem, tile),
        warps=tile.num_warps,
        steps=steps,
        # logits are read, and their gradient is written
        lines=steps * (features.lines + gradients.lines) + 2 * logit_lines(problem, tile),
        copies=issued * (features.copies + gradients.copies),
        # the gradient of the band is float32
        passes=issued * (features.passes + gradients.passes) + 2 * window.p * window.m * REGISTER_BYTES / LINE_BYTES,
        products=steps * _product_cycles(problem, window.p * window.m * tile.block_c, newer),
        loads=issued * (features.instructions + gradients.instructions),
        stores=0,
        logits=logits,
        band=0,
        exchanges=window.t * window.p * window.m / WARP_SIZE**2,
        splits=steps * _splits(problem, (window.p + window.m) * tile.block_c),
    )


def count_source_gradient(problem: TileProblem, tile: Tile, blocks: SourceBlocks) -> Work:
    """Return the work of the gradient to the features: for every block of channels, a band is built from the logits and multiplied."""
    spec, size = problem.spec, problem.element_size
    reached = reach(spec, tile.cells_h, tile.cells_w, run_vector(problem, tile, problem.y_align))
    x_align, y_align = run_alignments(problem, tile)
    steps = -(-reached.height * reached.width // blocks.targets)
    targets = steps * blocks.targets
    seen = reach_seen(problem, tile, reached)
    gradients = count_transfer(problem, tile, problem.channels_last, seen, targets, blocks.channels, reached.width, y_align, spec.up)
    seen = sources_seen(problem, tile)
    result = count_transfer(problem, tile, problem.x_last, seen, reached.s, blocks.channels, reached.cols, x_align, spec.down)
    all_blocks = -(-problem.channels // blocks.channels)
    active = min(tile.split, all_blocks)
    share = all_blocks / active
    issued = share * _issued(tile, steps) / steps
    newer = takes_four_warps(problem, tile, reached.s if problem.x_last else blocks.channels)
    rows, cols = cells_seen(problem, tile)
    gathered = spec.taps * rows * cols * spec.up**2 / _weights_per_line(problem)
    band = targets * reached.s
    return Work(
        programs=_tiles(problem, tile) * active,
        warps=tile.num_warps,
        steps=share * steps,
        lines=share * (gradients.lines + result.lines + gathered),
        copies=issued * gradients.copies,
        passes=issued * gradients.passes + share * (2 * count_lines(problem, reached.s * blocks.channels) + band * size / LINE_BYTES),
        products=share * _product_cycles(problem, band * blocks.channels, newer),
        loads=issued * gradients.instructions,
        stores=share * result.instructions,
        logits=0,
        band=share * band / WARP_SIZE,
        exchanges=0,
        splits=share * _splits(problem, targets * blocks.channels + band),
    )


def count_walk(problem: TileProblem, tile: Tile) -> Work:
    """Return the work of the gradient to the features by programs that walk; a step builds a band for each tile that it reads."""
    spec, size, channels = problem.spec, problem.element_size, tile.block_c
    step, radius = find_walk(problem, tile), spec.kernel_size // 2
    walks, across, down, visited, cols = count_walks(problem, tile, step)
    x_align, y_align = run_alignments(problem, tile)
    rows = problem.height * spec.up / down
    products = -(-step.height * step.width // step.d)
    targets = products * step.d
    gradients = count_transfer(problem, tile, problem.channels_last, (rows, cols), targets, channels, step.width, y_align, spec.up)
    sources = problem.height * spec.down / down, problem.width * spec.down / across
    # the first column of sources lies half a window before the cells
    x_align = math.gcd(x_align, radius) if radius else x_align
    result = count_transfer(problem, tile, problem.x_last, sources, step.s, channels, step.cols, x_align, spec.down)
    newer = takes_four_warps(problem, tile, step.s if problem.x_last else channels)
    # of the targets that the columns share, a tile reads a part of the weights
    own = problem.width * spec.up / across
    gathered = spec.taps * rows * own / _weights_per_line(problem)
    band = step.tiles * targets * step.s
    # a step above its walk builds the bands of those tiles alone that lie in the walk, half of them on average
    visited, built, stored = (steps / walks for steps in (visited, (visited + down) / 2, down))
    return Work(
        programs=across * walks * problem.batch * -(-problem.channels // channels),
        warps=tile.num_warps,
        steps=visited * products,
        lines=visited * gradients.lines + built * gathered + stored * result.lines,
        copies=0,
        passes=visited * gradients.passes + built * band * size / LINE_BYTES + stored * 2 * count_lines(problem, step.s * channels),
        products=built * _product_cycles(problem, band * channels, newer),
        loads=visited * gradients.instructions,
        stores=stored * result.instructions,
        logits=0,
        band=built * band / WARP_SIZE,
        exchanges=0,
        splits=built * _splits(problem, targets * channels + band),
    )


def find_walk(problem: TileProblem, tile: Tile) -> Walk:
    """Return the extents of a step of a program that walks."""
    return walk(problem.spec, tile.cells_h, tile.cells_w, run_vector(problem, tile, problem.y_align), walk_targets(problem, tile))


def _product_cycles(problem: TileProblem, products: float, newer: bool) -> float:
    factor = 1 if problem.element_size == 2 else FLOAT32_PRODUCTS
    return factor * products / (WARPGROUP_PRODUCTS if newer else WARP_PRODUCTS)


def _splits(problem: TileProblem, elements: float) -> float:
    return elements / WARP_SIZE * (operand_terms(problem.element_size) - 1)


def _weights_per_line(problem: TileProblem) -> int:
    """Return how many weights the sources of a tile gather from one line of memory."""
    if problem.weighed:
        return WEIGHTS_PER_GATHER
    return LOGITS_PER_GATHER if problem.channels_last else 1


def takes_four_warps(problem: TileProblem, tile: Tile, rows: int) -> bool:
    """Return whether a product with this number of rows uses the matrix instruction of four warps."""
    return problem.capability >= (9, 0) and tile.num_warps % 4 == 0 and rows >= WARPGROUP_ROWS


def _tiles(problem: TileProblem, tile: Tile) -> int:
    return -(-problem.height // tile.cells_h) * -(-problem.width // tile.cells_w) * problem.batch


def _issued(tile: Tile, steps: float) -> float:
    """Return how often a loop of this many steps issues its loads: a pipeline also issues those after its last step, which load nothing."""
    return steps + tile.num_stages - 1
