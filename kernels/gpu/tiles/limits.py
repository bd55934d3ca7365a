"""The tiles that fit: the candidates, and the registers and shared memory that they need.

A tile outside these limits may spill registers or not launch at all. The registers of a kernel are estimated from the tensors that it holds
at the same time, in registers of 32 bits per thread. The limits on this estimate were fitted to kernels compiled for capabilities 8.0, 9.0
and 10.0: the chosen tiles do not spill, and only a few of the other tiles that fit do.

M, P, T: targets, halo and taps of a tile, rounded up to a power of two.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from .geometry import (
    COPYING,
    SMALLEST_EXTENT,
    KernelName,
    Tile,
    TileProblem,
    as_read,
    halo,
    place_walk,
    power_of_two,
    reach,
    run_alignments,
    source_bytes,
)

WARP_SIZE = 32
# rows of a product by the matrix instruction of four warps, which must all be there
WARPGROUP_ROWS = 64
REGISTER_BYTES = 4
# per program: less than the 99 KiB that a program may take at capabilities 8.6, 8.9 and 12.0 (CUDA programming guide)
SHARED_BYTES = 96 * 1024

# the cells of a tile; few, because each is a separate compilation. Seven columns divide the maps of images of 224 and 800 x 1333 pixels;
# three cells of up 3 have 27 targets and read 63 sources in windows of 7 x 7, nearly powers of two
CELLS = ((1, 1), (1, 2), (1, 3), (1, 4), (1, 8), (1, 14), (1, 16), (2, 2), (2, 4), (2, 7), (2, 8), (3, 4), (4, 4))
SMALL_CELLS, LARGEST_CELLS = 4, 16
VECTORS = (1, 2, 4)
# the widest of forward
FORWARD_VECTOR = 2
# what a search by measurement tries in addition
WIDE_CELLS = ((1, 7), (2, 16), (4, 7), (4, 8))
WIDE_CHANNELS, WIDE_WARPS, WIDE_STAGES, WIDE_CAPS = (128, 64, 32), (2, 4, 8), (1, 2, 3, 4), (255, 168, 128)
# the same for the gradient to the logits by programs that compute several tiles, which need the registers of many warps
WIDE_STACKS, WIDE_STACK_WARPS = (2, 4, 8), (4, 8, 16)
SPLITS = (1, 2, 4)

# estimated registers of the forward kernel for each term of an operand, by warps of a program
FORWARD_REGISTERS = {2: 136, 4: 128}
# logits [T, M] per thread
FORWARD_LOGITS, BACKWARD_LOGITS = 64, 32
# taps times sources of the halo, T * P, per thread: bounds the window
FORWARD_WINDOW, BACKWARD_WINDOW = 128, 64
# estimated registers of the kernels of the two gradients, and the same where the matrix units leave fewer registers (`has_less_room`)
BACKWARD_REGISTERS, BACKWARD_REGISTERS_LESS_ROOM = 128, 108
# registers to add to the estimate of the gradient to the logits in float32
FLOAT32_REGISTERS = 20
# targets [M] of the gradient to the logits; a single cell may have more, so that large scales have a tile
BACKWARD_TARGETS = 64

# channels of one product of the gradient to the sources
SOURCE_CHANNELS = (256, 128, 64, 32)
# targets of the same product by element size, and bytes of the gradient in it
SOURCE_TARGETS, SOURCE_GRADIENT_BYTES = {2: 64, 4: 16}, 16384
# in a launch of both gradients: bytes of the channels where the matrix units leave fewer registers and the channels are too many for all
# programs to share, targets in bytes of one channel, and elements of the gradient for each channel of a product of the other gradient
SOURCE_CHANNEL_BYTES_LESS_ROOM, SOURCE_TARGET_BYTES, SOURCE_ELEMENTS = 256, 128, 256

# features of fewer bytes are read as they are: the launch that copies them takes host time, and the time of a launch
LEAST_COPIED_BYTES = 4 << 20

# the gradient to the features by programs that walk: cells, channels and number of their steps; many numbers, because few programs are on
# a device at the same time, and one that they divide evenly leaves no multiprocessor idle
WALK_CELLS = ((1, 2), (1, 4), (1, 8), (1, 16), (2, 2), (2, 4), (2, 8), (2, 16), (4, 4), (4, 8))
WALK_CHANNELS, WALK_STEPS = (256, 128, 64, 32), (3, 4, 5, 7, 9, 12, 16, 24)
# a program of more channels has eight warps
CHANNELS_OF_FOUR_WARPS = 64
# most registers per thread, with which a multiprocessor holds 16 warps
WALK_REGISTERS = 128
WIDE_WALK_REGISTERS, WIDE_WALK_STAGES, WIDE_WALK_WARPS = (128, 168), (1, 2), 16
# most targets of one product in 16 bits, and in float32 with and without the channels as the fastest axis
WALK_TARGETS, WALK_TARGETS_LAST, WALK_TARGETS_ROWS = 64, 32, 16
# per thread: elements of the gradient in one product, weights of one tile of sources, and sums of all tiles of sources; by element size
WALK_ELEMENTS, WALK_WEIGHTS, WALK_SUMS = {2: 32, 4: 16}, {2: 4, 4: 4}, {2: 48, 4: 24}
# the first of these with channels as the fastest axis and as the rows of a product, which leaves more registers
TALL_WALK_ELEMENTS = 64
# share of these sums in tiles of more sources than the smallest
LARGE_WALK_SUMS = 2 / 3
# in 16 bits: estimated registers, of which a vector that is loaded or stored takes several for its address
WALK_ESTIMATE, VECTOR_REGISTERS = 128, 4


class SourceBlocks(NamedTuple):
    """The extents of one product of the gradient to the sources."""

    channels: int
    targets: int  # of those that read the sources of the tile


def source_blocks(kernel: KernelName, problem: TileProblem, tile: Tile) -> SourceBlocks:
    """Return the extents of one product of the gradient to the sources.

    In a launch of both gradients, these are all channels of a program if they fit.
    """
    size = problem.element_size
    if kernel == "backward":
        room = SOURCE_CHANNEL_BYTES_LESS_ROOM // size
        most = room if problem.channels > SPLITS[-1] * room and has_less_room(problem) else SOURCE_CHANNELS[0]
        channels = min(most, power_of_two(-(-problem.channels // tile.split)))
        targets = min(SOURCE_TARGET_BYTES // size, SOURCE_ELEMENTS * tile.block_c // channels)
    else:
        channels = tile.block_c
        targets = min(SOURCE_TARGETS[size], SOURCE_GRADIENT_BYTES // size // channels)
    return SourceBlocks(channels, max(SMALLEST_EXTENT, targets))


def walk_targets(problem: TileProblem, tile: Tile) -> int:
    """Return the targets of one product of a program that walks."""
    size, threads = problem.element_size, WARP_SIZE * tile.num_warps
    most = WALK_TARGETS if size == 2 else WALK_TARGETS_LAST if problem.channels_last else WALK_TARGETS_ROWS
    sources = count_sources(problem, tile)
    elements = TALL_WALK_ELEMENTS if problem.x_last and is_tall(problem, tile, tile.block_c) else WALK_ELEMENTS[size]
    return max(SMALLEST_EXTENT, min(most, elements * threads // tile.block_c, WALK_WEIGHTS[size] * threads // sources))


def count_sources(problem: TileProblem, tile: Tile) -> int:
    """Return the sources of a tile, as an axis of a product."""
    return power_of_two(tile.cells_h * tile.cells_w * problem.spec.down**2)


def is_tall(problem: TileProblem, tile: Tile, channels: int) -> bool:
    """Return whether the channels are the rows of the products of the gradient to the features, of this many channels.

    In channels_last, they are where the newer matrix units take them and not the sources. These take float32 in one order only.
    """
    newer = problem.capability >= (9, 0) and tile.num_warps % 4 == 0 and problem.element_size == 2
    return not problem.x_last or (newer and count_sources(problem, tile) < WARPGROUP_ROWS <= channels)


def gradient_registers(problem: TileProblem) -> int:
    """Return the most estimated registers of a kernel that computes a gradient."""
    return BACKWARD_REGISTERS_LESS_ROOM if has_less_room(problem) else BACKWARD_REGISTERS


def has_less_room(problem: TileProblem) -> bool:
    """Return whether the matrix units leave the gradients fewer registers: from capability 9.0 in float32, from 10.0 in 16 bits."""
    return problem.capability >= ((9, 0) if problem.element_size == 4 else (10, 0))


def operand_terms(element_size: int) -> int:
    """Return the number of terms of an operand of a product: a float32 operand is split into its leading and its remaining bits."""
    return 1 if element_size == 2 else 2


def operand_registers(elements: int, element_size: int) -> float:
    """Return the registers that a number of elements of an operand take, all terms together."""
    return elements * element_size / REGISTER_BYTES * operand_terms(element_size)


def fitting_tiles(kernel: KernelName, problem: TileProblem) -> Iterator[Tile]:
    """Yield the candidates that fit; none if the window is too large.

    Forward takes the most channels that fit, because the model of time sees little difference between blocks of channels there.
    """
    found: set[Tile] = set()
    for tile in candidate_tiles(kernel, problem):
        kind = tile._replace(block_c=0) if kernel == "forward" else tile
        if kind not in found and fits(kernel, problem, tile):
            found.add(kind)
            yield tile


def fits(kernel: KernelName, problem: TileProblem, tile: Tile) -> bool:
    """Return whether a kernel can run with this tile, without registers that spill."""
    problem = as_read(kernel, problem, tile)
    if kernel == "forward":
        return fits_forward(problem, tile)
    if kernel == "source_gradient" and tile.steps > 1:
        return fits_walk(problem, tile)
    logits = kernel == "source_gradient" or fits_logit_gradient(problem, tile)
    return logits and (kernel == "logit_gradient" or fits_source_gradient(problem, tile, source_blocks(kernel, problem, tile)))


def may_transpose(kernel: KernelName, problem: TileProblem) -> bool:
    """Return whether a kernel may read a channels_last copy of features in NCHW: maps below a limit are not worth a launch."""
    return kernel in COPYING and not problem.channels_last and source_bytes(problem) >= LEAST_COPIED_BYTES


def gains_by_copy(kernel: KernelName, problem: TileProblem) -> bool:
    """Return whether a kernel that reads a copy was the faster one where both were measured: in 16 bits, and not with the larger map.

    The gradient to the logits gains by a copy of the larger map, too.
    """
    return problem.element_size == 2 and (kernel == "logit_gradient" or problem.spec.up > problem.spec.down)


def candidate_tiles(kernel: KernelName, problem: TileProblem) -> Iterator[Tile]:
    """Yield the tiles to choose from, including those that do not fit, in the order of falling channels."""
    yield from _candidates(kernel, problem, _vectors(kernel, problem))
    if may_transpose(kernel, problem) and gains_by_copy(kernel, problem):
        yield from (tile._replace(transposed=1) for tile in _candidates(kernel, problem, (1,)))


def wide_tiles(kernel: KernelName, problem: TileProblem) -> Iterator[Tile]:
    """Yield the tiles among which a search by measurement looks, including those that do not fit."""
    yield from _wide_candidates(kernel, problem, _vectors(kernel, problem))
    if may_transpose(kernel, problem):
        yield from (tile._replace(transposed=1) for tile in _wide_candidates(kernel, problem, (1,)))


def _vectors(kernel: KernelName, problem: TileProblem) -> tuple[int, ...]:
    align = problem.x_align if kernel == "forward" else problem.y_align
    return (1,) if problem.channels_last else tuple(vector for vector in VECTORS if align % vector == 0)


def _candidates(kernel: KernelName, problem: TileProblem, vectors: tuple[int, ...]) -> Iterator[Tile]:
    half, newer = problem.element_size == 2, problem.capability >= (9, 0)
    if kernel == "forward":
        # wider vectors widen the halo by more than they save
        vectors = tuple(vector for vector in vectors if vector <= FORWARD_VECTOR)
    if kernel in ("forward", "backward"):
        # a product of the newer matrix units has 64 rows, which may be the channels
        channels = (64,) if newer else (64, 32) if half else (32, 16)
    elif kernel == "logit_gradient":
        channels = (64, 32) if half else (64, 32, 16)
    else:
        # the widest vectors are the fastest
        vectors = vectors[-1:]
        most = power_of_two(problem.channels)
        channels = tuple(number for number in SOURCE_CHANNELS if number <= most) or (most,)
    splits = (1,) if kernel == "logit_gradient" else SPLITS
    # two warps share more of the work that builds a band; the newer matrix units take four warps together; eight are slow in float32
    warps = (4, 8) if kernel == "logit_gradient" and half else (2,) if kernel == "forward" and not newer else (4,)
    # a loop of few steps gains nothing by a pipeline, which also fills its buffers once
    stages = ((1, 2) if kernel in ("forward", "logit_gradient") else (2,)) if half else (1,)
    if kernel == "logit_gradient" and not half and problem.channels_last:
        stages = (1, 3)
    for cells, vector, split, block_c, num_warps, num_stages in product(CELLS, vectors, splits, channels, warps, stages):
        # eight warps have room for the largest tiles, and too little work in the others
        if num_warps == 8 and cells[0] * cells[1] < LARGEST_CELLS:
            continue
        # both gradients together spill without vectors, except in small tiles
        if kernel == "backward" and cells[0] * cells[1] > SMALL_CELLS and vector == 1 < vectors[-1]:
            continue
        if split == 1 or block_c * split <= problem.channels:
            yield Tile(*cells, vector, block_c, split, num_warps, num_stages)
    if kernel == "source_gradient":
        yield from walking_tiles(problem, vectors[-1])


def walking_tiles(problem: TileProblem, vector: int) -> Iterator[Tile]:
    """Yield the tiles of programs that walk, including those that do not fit."""
    most = power_of_two(problem.channels)
    channels = tuple(number for number in WALK_CHANNELS if number <= most) or (most,)
    for cells, block_c, steps in product(WALK_CELLS, channels, WALK_STEPS):
        # a walk need not be longer than the map
        if steps == WALK_STEPS[0] or steps * cells[0] < 2 * problem.height:
            num_warps = 4 if block_c <= CHANNELS_OF_FOUR_WARPS else 8
            # the compiler makes a pipeline of products with an even number of tiles alone, which nobody has measured
            yield Tile(*cells, vector, block_c, 1, num_warps, 1, WALK_REGISTERS, steps)


def _wide_candidates(kernel: KernelName, problem: TileProblem, vectors: tuple[int, ...]) -> Iterator[Tile]:
    channels = SOURCE_CHANNELS if kernel == "source_gradient" else WIDE_CHANNELS
    splits = (1,) if kernel == "logit_gradient" else SPLITS
    for cells, vector, split, block_c, *rest in product(
        (*CELLS, *WIDE_CELLS), vectors, splits, channels, WIDE_WARPS, WIDE_STAGES, WIDE_CAPS
    ):
        if split == 1 or block_c * split <= problem.channels:
            yield Tile(*cells, vector, block_c, split, *rest)
    if kernel == "source_gradient":
        for tile, max_registers, stages in product(walking_tiles(problem, vectors[-1]), WIDE_WALK_REGISTERS, WIDE_WALK_STAGES):
            yield tile._replace(max_registers=max_registers, num_stages=stages)
            if tile.block_c == WALK_CHANNELS[0] and max_registers == WALK_REGISTERS:
                yield tile._replace(num_warps=WIDE_WALK_WARPS, num_stages=stages)
    if kernel == "logit_gradient":
        cells = (*CELLS, *WIDE_CELLS)
        for cell, vector, block_c, num_warps, cap, steps in product(cells, vectors, channels, WIDE_STACK_WARPS, WIDE_CAPS, WIDE_STACKS):
            yield Tile(*cell, vector, block_c, 1, num_warps, 1, cap, steps)


def fits_forward(problem: TileProblem, tile: Tile) -> bool:
    """Return whether the forward kernel can run with this tile."""
    size, threads = problem.element_size, WARP_SIZE * tile.num_warps
    window = halo(problem.spec, tile.cells_h, tile.cells_w, tile.vector)
    band, features = window.m * window.p, window.p * tile.block_c
    # every warp holds the whole band; in one stage, features pass through registers on their way to shared memory
    registers = window.m * tile.block_c / threads + operand_registers(band, size) / WARP_SIZE
    if tile.num_stages == 1:
        registers += operand_registers(features, size) / threads
    return (
        registers <= FORWARD_REGISTERS[tile.num_warps] * operand_terms(size)
        and (features + band) * size * operand_terms(size) <= SHARED_BYTES
        and window.t * window.m / threads <= FORWARD_LOGITS
        and window.t * window.p / threads <= FORWARD_WINDOW
    )


def fits_logit_gradient(problem: TileProblem, tile: Tile) -> bool:
    """Return whether the kernel of the gradient to the logits can run with this tile."""
    size, threads = problem.element_size, WARP_SIZE * tile.num_warps
    terms = operand_terms(size)
    window = halo(problem.spec, tile.cells_h, tile.cells_w, min(tile.vector, problem.x_align))
    features, band = (window.m + window.p) * tile.block_c, window.m * window.p
    registers = tile.steps * band / threads + operand_registers(features, size) / threads + FLOAT32_REGISTERS * (terms - 1)
    return (
        registers <= gradient_registers(problem)
        # the gradient of the band is float32
        and max(features * size, band * REGISTER_BYTES) * terms <= SHARED_BYTES
        and window.t * window.m / threads <= BACKWARD_LOGITS
        and window.t * window.p / threads <= BACKWARD_WINDOW
        and (window.m <= BACKWARD_TARGETS or tile.cells_h * tile.cells_w == 1)
    )


def fits_source_gradient(problem: TileProblem, tile: Tile, blocks: SourceBlocks) -> bool:
    """Return whether the kernel of the gradient to the features can run with this tile."""
    size, threads = problem.element_size, WARP_SIZE * tile.num_warps
    channels, targets = blocks
    sources = reach(problem.spec, tile.cells_h, tile.cells_w, tile.vector).s
    # every warp holds the whole band
    operands = operand_registers(targets * channels, size) / threads + operand_registers(targets * sources, size) / WARP_SIZE
    shared = targets * (channels + sources) * size * operand_terms(size)
    return sources * channels / threads + operands <= gradient_registers(problem) and shared <= SHARED_BYTES


def fits_walk(problem: TileProblem, tile: Tile) -> bool:
    """Return whether programs that walk can run with this tile."""
    size, threads = problem.element_size, WARP_SIZE * tile.num_warps
    targets = walk_targets(problem, tile)
    step = place_walk(problem, tile, tile.vector, targets)
    gradients, sources = (extent * tile.block_c / threads for extent in (step.d, step.s))
    x_align, y_align = run_alignments(problem, tile)
    if not problem.x_last:
        # the first column of sources lies half a window before the cells
        x_align = math.gcd(x_align, problem.spec.kernel_size // 2, step.cols)
    vectors = gradients / y_align + sources / x_align
    return (
        step.tiles * sources <= WALK_SUMS[size] * (1 if step.s == SMALLEST_EXTENT else LARGE_WALK_SUMS)
        and (size == 4 or step.tiles * sources + gradients / 2 + VECTOR_REGISTERS * vectors <= WALK_ESTIMATE)
        and step.s * targets / threads <= WALK_WEIGHTS[size]
        and targets * (tile.block_c + step.s) * size * operand_terms(size) <= SHARED_BYTES
    )
