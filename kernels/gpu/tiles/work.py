"""The work of a tile, counted from the code of the kernels: instructions, lines of memory, passes over shared memory and products.

Every count is an average over the tiles of a map: a location outside the map costs instructions, but no memory. Nothing here is measured;
time_model.py turns the counts into microseconds.

A program that walks does the work of its steps, and of the steps above them whose targets read its sources too.

M, P, T: targets, halo and taps of a tile, rounded up to a power of two; S, D: its sources and the targets that read them.
"""

import math
from typing import NamedTuple

from .geometry import KernelName, Tile, TileProblem, Walk, as_read, count_walks, halo, place_walk, reach, run_alignments, run_vector
from .limits import REGISTER_BYTES, WARP_SIZE, WARPGROUP_ROWS, SourceBlocks, is_tall, operand_terms, source_blocks, walk_targets
from .memory import (
    LINE_BYTES,
    LOGITS_PER_GATHER,
    WEIGHTS_PER_GATHER,
    cells_seen,
    count_lines,
    count_transfer,
    halo_seen,
    logit_lines,
    logit_partials,
    reach_seen,
    sources_seen,
    stored_partials,
    targets_seen,
)

# multiply-adds in 16 bits of a multiprocessor in a cycle: by the matrix instruction of a warp, and by that of four warps from 9.0 on
WARP_PRODUCTS, WARPGROUP_PRODUCTS = 1024, 2048
# the time of a float32 product over that in 16 bits: three products in TF32 at half the speed
FLOAT32_PRODUCTS = 6
# rows that the older matrix instruction computes
WARP_ROWS = 16
# passes for each line of a float32 operand that must be turned in shared memory, by the emulator: its stores conflict
TURNED_PASSES = 12


class Work(NamedTuple):
    """The work of all programs of one kind, for each program. Counts of instructions and elements are those of a warp, over all warps."""

    programs: float  # that have channels to compute
    warps: float
    steps: float  # iterations of the loops of a program
    lines: float  # lines of memory that are loaded or stored
    partials: float  # sectors of memory that are stored in part
    copies: float  # asynchronous copies of fewer than 16 bytes per thread
    passes: float  # passes over shared memory by the instructions of warps
    products: float  # cycles of the matrix units
    loads: float  # instructions that load features
    stores: float
    logits: float  # logits that are normalised, or turned into their gradient
    band: float  # weights that the gradient to the features rebuilds
    exchanges: float  # of the weights of a tile between the threads of a warp


def count_work(kernel: KernelName, problem: TileProblem, tile: Tile) -> tuple[Work, ...]:
    """Return the work of each kind of program of a kernel: two kinds if it computes both gradients."""
    problem = as_read(kernel, problem, tile)
    if kernel == "forward":
        return (count_forward(problem, tile),)
    if kernel == "source_gradient" and tile.steps > 1:
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
    # a product with the targets as rows takes the features along another axis than they are loaded
    wide = last and window.rows * window.cols >= WARPGROUP_ROWS
    rows, columns = (window.m, channels) if wide else (channels, window.m)
    turned = window.p * channels if problem.x_last and (wide or tile.num_stages > 1) else 0
    band, steps = window.p * window.m, blocks / active
    issued = _issued(tile, steps)
    operands = _operand_passes(problem, tile, rows, columns, window.p) + _turned_passes(problem, turned)
    return Work(
        programs=_tiles(problem, tile) * active,
        warps=tile.num_warps,
        steps=steps,
        lines=steps * (features.lines + result.lines) + logit_lines(problem, tile),
        partials=steps * stored_partials(problem, last, seen, channels, up, tile.cells_w * up),
        copies=issued * features.copies,
        passes=issued * features.passes
        + steps * (2 * count_lines(problem, window.m * channels) + operands)
        + 2 * count_lines(problem, band),
        products=steps * _product_cycles(problem, band * channels, takes_four_warps(problem, tile, rows)),
        loads=issued * features.instructions,
        stores=steps * result.instructions,
        logits=window.t * window.m / WARP_SIZE,
        band=0,
        exchanges=window.t * band / WARP_SIZE**2,
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
    # a pipeline keeps rows of pixels in shared memory as they are loaded, and the product takes channels
    turned = (window.p * (not problem.x_last) + window.m * (not problem.channels_last)) * tile.block_c if tile.num_stages > 1 else 0
    operands = _operand_passes(problem, tile, window.p, window.m, tile.block_c) + _turned_passes(problem, turned)
    one = Work(
        programs=_tiles(problem, tile),
        warps=tile.num_warps,
        steps=steps,
        # logits are read, and their gradient is written
        lines=steps * (features.lines + gradients.lines) + 2 * logit_lines(problem, tile),
        partials=logit_partials(problem, tile),
        copies=issued * (features.copies + gradients.copies),
        # the gradient of the band is float32
        passes=issued * (features.passes + gradients.passes) + steps * operands + 2 * window.p * window.m * REGISTER_BYTES / LINE_BYTES,
        products=steps * _product_cycles(problem, window.p * window.m * tile.block_c, newer),
        loads=issued * (features.instructions + gradients.instructions),
        stores=0,
        logits=logits,
        band=0,
        exchanges=window.t * window.p * window.m / WARP_SIZE**2,
    )
    # a program does the work of its tiles, and starts once
    return Work(*(tile.steps * count for count in one))._replace(programs=one.programs, warps=one.warps)


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
    rows, columns = (blocks.channels, reached.s) if is_tall(problem, tile, blocks.channels) else (reached.s, blocks.channels)
    newer = takes_four_warps(problem, tile, rows)
    partials = stored_partials(problem, problem.x_last, seen, blocks.channels, spec.down, tile.cells_w * spec.down)
    operands = _operand_passes(problem, tile, rows, columns, blocks.targets, bands=1)
    rows, cols = cells_seen(problem, tile)
    gathered = spec.taps * rows * cols * spec.up**2 / _weights_per_line(problem)
    band = targets * reached.s
    return Work(
        programs=_tiles(problem, tile) * active,
        warps=tile.num_warps,
        steps=share * steps,
        lines=share * (gradients.lines + result.lines + gathered),
        partials=share * partials,
        copies=issued * gradients.copies,
        passes=issued * gradients.passes
        + share * (2 * count_lines(problem, reached.s * blocks.channels) + band * size / LINE_BYTES + steps * operands),
        products=share * _product_cycles(problem, band * blocks.channels, newer),
        loads=issued * gradients.instructions,
        stores=share * result.instructions,
        logits=0,
        band=share * band / WARP_SIZE,
        exchanges=0,
    )


def count_walk(problem: TileProblem, tile: Tile) -> Work:
    """Return the work of the gradient to the features by programs that walk; a step builds a band for each tile that it reads."""
    spec, size, channels = problem.spec, problem.element_size, tile.block_c
    step, radius = find_walk(problem, tile), spec.kernel_size // 2
    walks, across, down, visited, cols = count_walks(problem, tile, step)
    x_align, y_align = run_alignments(problem, tile)
    height = problem.height * spec.up / down
    products = -(-step.height * step.width // step.d)
    targets = products * step.d
    gradients = count_transfer(problem, tile, problem.channels_last, (height, cols), targets, channels, step.width, y_align, spec.up)
    sources = problem.height * spec.down / down, problem.width * spec.down / across
    # the first column of sources lies half a window before the cells
    x_align = math.gcd(x_align, radius) if radius else x_align
    result = count_transfer(problem, tile, problem.x_last, sources, step.s, channels, step.cols, x_align, spec.down)
    partials = stored_partials(problem, problem.x_last, sources, channels, spec.down, tile.cells_w * spec.down, radius)
    rows, columns = (channels, step.s) if is_tall(problem, tile, channels) else (step.s, channels)
    newer = takes_four_warps(problem, tile, rows)
    operands = _operand_passes(problem, tile, rows, columns, step.d, bands=step.tiles)
    # of the targets that the columns share, a tile reads a part of the weights
    own = problem.width * spec.up / across
    gathered = spec.taps * height * own / _weights_per_line(problem)
    band = step.tiles * targets * step.s
    # a step above its walk builds the bands of those tiles alone that lie in the walk, half of them on average
    visited, built, stored = (steps / walks for steps in (visited, (visited + down) / 2, down))
    return Work(
        programs=across * walks * problem.batch * -(-problem.channels // channels),
        warps=tile.num_warps,
        steps=visited * products,
        lines=visited * gradients.lines + built * gathered + stored * result.lines,
        partials=stored * partials,
        copies=0,
        passes=visited * gradients.passes
        + built * (band * size / LINE_BYTES + products * operands)
        + stored * 2 * count_lines(problem, step.s * channels),
        products=built * _product_cycles(problem, band * channels, newer),
        loads=visited * gradients.instructions,
        stores=stored * result.instructions,
        logits=0,
        band=built * band / WARP_SIZE,
        exchanges=0,
    )


def find_walk(problem: TileProblem, tile: Tile) -> Walk:
    """Return the extents of a step of a program that walks."""
    return place_walk(problem, tile, run_vector(problem, tile, problem.y_align), walk_targets(problem, tile))


def _product_cycles(problem: TileProblem, products: float, newer: bool) -> float:
    factor = 1 if problem.element_size == 2 else FLOAT32_PRODUCTS
    return factor * products / (WARPGROUP_PRODUCTS if newer else WARP_PRODUCTS)


def _operand_passes(problem: TileProblem, tile: Tile, rows: int, columns: int, inner: int, *, bands: int = 0) -> float:
    """Return the passes over shared memory for the operands of a product [rows, inner] x [inner, columns], or of one with each of `bands`.

    The matrix instruction of four warps reads its operands itself, and a float32 operand is stored once more for its second term. For the
    older one, every warp reads the rows and the columns of its part of the result; a band has both terms in shared memory, and the features
    that bands multiply are read once.
    """
    terms = operand_terms(problem.element_size)
    if takes_four_warps(problem, tile, rows):
        along_rows, along_columns, times = 1, 1, terms - 1
    else:
        along_rows, along_columns, times = *_warps(rows, columns, tile.num_warps), terms
    first, second = rows * inner * along_columns, columns * inner * along_rows
    if not bands:
        return count_lines(problem, (first + second) * times)
    band, features = (first, second) if problem.x_last else (second, first)
    return count_lines(problem, bands * band * times + features * min(times, 1))


def _warps(rows: int, columns: int, num_warps: int) -> tuple[int, int]:
    """Return the warps along both axes of a product by the older matrix instruction, as Triton places them."""
    along_rows = along_columns = 1
    while along_rows * along_columns < num_warps:
        if along_rows * WARP_ROWS < rows and rows * along_columns >= columns * along_rows:
            along_rows *= 2
        else:
            along_columns *= 2
    return along_rows, along_columns


def _turned_passes(problem: TileProblem, elements: int) -> float:
    """Return the passes that turn float32 operands; products of 16 bits take both orders."""
    return TURNED_PASSES * count_lines(problem, elements) if problem.element_size == 4 else 0


def _weights_per_line(problem: TileProblem) -> int:
    """Return how many weights the sources of a tile gather from one line of memory."""
    if problem.weighed:
        return WEIGHTS_PER_GATHER
    return LOGITS_PER_GATHER if problem.channels_last else 1


def takes_four_warps(problem: TileProblem, tile: Tile, rows: int) -> bool:
    """Return whether a product with this number of rows uses the matrix instruction of four warps."""
    return problem.capability >= (9, 0) and tile.num_warps % 4 == 0 and rows >= WARPGROUP_ROWS


def _tiles(problem: TileProblem, tile: Tile) -> int:
    return -(-problem.height // (tile.cells_h * tile.steps)) * -(-problem.width // tile.cells_w) * problem.batch


def _issued(tile: Tile, steps: float) -> float:
    """Return how often a loop of this many steps issues its loads: a pipeline also issues those after its last step, which load nothing."""
    return steps + tile.num_stages - 1
