"""The tiles that fit: the candidates, and the registers and shared memory that they need.

A tile outside these limits may spill registers or not launch at all. The registers of a kernel are estimated from the tensors that it holds
at the same time, in registers of 32 bits per thread. The limits on this estimate were fitted to kernels compiled for capabilities 8.0, 9.0
and 10.0: the chosen tiles do not spill, and only a few of the other tiles that fit do.

M, P, T: targets, halo and taps of a tile, rounded up to a power of two.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from .tile_geometry import SMALLEST_EXTENT, Direction, Tile, TileProblem, halo, power_of_two, reach

WARP_SIZE = 32
REGISTER_BYTES = 4
# per program: less than the 99 KiB that a program may take at capabilities 8.6, 8.9 and 12.0 (CUDA programming guide)
SHARED_BYTES = 96 * 1024

# the cells of a tile; few, because each is a separate compilation. Seven columns divide the maps of images of 224 and 800 x 1333 pixels
CELLS = ((1, 1), (1, 2), (1, 4), (1, 8), (1, 14), (1, 16), (2, 2), (2, 4), (2, 7), (2, 8), (3, 4), (4, 4))
VECTORS = (1, 2, 4)
SPLITS = (1, 2, 4)

# estimated registers of the forward kernel for each term of an operand, by warps of a program
FORWARD_REGISTERS = {2: 136, 4: 128}
# logits [T, M] per thread
FORWARD_LOGITS, BACKWARD_LOGITS = 64, 32
# taps times sources of the halo, T * P, per thread: bounds the window
FORWARD_WINDOW, BACKWARD_WINDOW = 128, 64
# estimated registers of the backward kernel, and the same where the matrix units leave fewer registers (`has_less_room`)
BACKWARD_REGISTERS, BACKWARD_REGISTERS_LESS_ROOM = 128, 108
# registers to add to the estimate of the gradient to the logits in float32
FLOAT32_REGISTERS = 20
# targets [M] of the gradient to the logits; a single cell may have more, so that large scales have a tile
BACKWARD_TARGETS = 64

# channels of one product of the gradient to the sources
SOURCE_CHANNELS = 256
# bytes of these channels where the matrix units leave fewer registers and the channels are too many for all programs to share
SOURCE_CHANNEL_BYTES_LESS_ROOM = 256
# targets of the same product, in bytes of one channel
SOURCE_TARGET_BYTES = 128
# elements of the gradient in the same product, targets times channels, for each channel of a product of the other gradient
SOURCE_ELEMENTS = 256


class SourceBlocks(NamedTuple):
    """The extents of one product of the gradient to the sources."""

    channels: int
    targets: int  # of those that read the sources of the tile


def source_blocks(problem: TileProblem, tile: Tile) -> SourceBlocks:
    """Return the extents of one product of the gradient to the sources: all channels of a program if they fit."""
    room = SOURCE_CHANNEL_BYTES_LESS_ROOM // problem.element_size
    most = room if problem.channels > SPLITS[-1] * room and has_less_room(problem) else SOURCE_CHANNELS
    channels = min(most, power_of_two(-(-problem.channels // tile.split)))
    targets = min(SOURCE_TARGET_BYTES // problem.element_size, SOURCE_ELEMENTS * tile.block_c // channels)
    return SourceBlocks(channels, max(SMALLEST_EXTENT, targets))


def has_less_room(problem: TileProblem) -> bool:
    """Return whether the matrix units leave the backward kernel fewer registers: from capability 9.0 in float32, from 10.0 in 16 bits."""
    return problem.capability >= ((9, 0) if problem.element_size == 4 else (10, 0))


def operand_terms(element_size: int) -> int:
    """Return the number of terms of an operand of a product: a float32 operand is split into its leading and its remaining bits."""
    return 1 if element_size == 2 else 2


def operand_registers(elements: int, element_size: int) -> float:
    """Return the registers that a number of elements of an operand take, all terms together."""
    return elements * element_size / REGISTER_BYTES * operand_terms(element_size)


def fitting_tiles(direction: Direction, problem: TileProblem) -> Iterator[Tile]:
    """Yield the candidates that fit in one pass; none if the window is too large.

    Forward takes the most channels that fit. The model of time sees little difference between blocks of channels there.
    """
    fits = fits_forward if direction == "forward" else fits_backward
    found: set[Tile] = set()
    for tile in candidate_tiles(direction, problem):
        kind = tile._replace(block_c=0) if direction == "forward" else tile
        if kind not in found and fits(problem, tile):
            found.add(kind)
            yield tile


def candidate_tiles(direction: Direction, problem: TileProblem) -> Iterator[Tile]:
    """Yield the tiles to choose from, including those that do not fit, in the order of falling channels."""
    align = problem.x_align if direction == "forward" else problem.y_align
    vectors = (1,) if problem.channels_last else tuple(vector for vector in VECTORS if align % vector == 0)
    half, newer = problem.element_size == 2, problem.capability >= (9, 0)
    # a product of the newer matrix units has 64 rows, which may be the channels
    channels = (64,) if newer else (64, 32) if half else (32, 16)
    # two warps share more of the work that builds a band; the newer matrix units take four warps together
    num_warps = 2 if direction == "forward" and not newer else 4
    for cells, vector, split, block_c in product(CELLS, vectors, SPLITS, channels):
        if split == 1 or block_c * split <= problem.channels:
            yield Tile(*cells, vector, block_c, split, num_warps, 2 if half else 1)


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


def fits_backward(problem: TileProblem, tile: Tile) -> bool:
    """Return whether the backward kernel can run with this tile."""
    limit = BACKWARD_REGISTERS_LESS_ROOM if has_less_room(problem) else BACKWARD_REGISTERS
    return _logit_gradient_fits(problem, tile, limit) and _source_gradient_fits(problem, tile, limit)


def _logit_gradient_fits(problem: TileProblem, tile: Tile, most_registers: int) -> bool:
    size, threads = problem.element_size, WARP_SIZE * tile.num_warps
    terms = operand_terms(size)
    window = halo(problem.spec, tile.cells_h, tile.cells_w, min(tile.vector, problem.x_align))
    features, band = (window.m + window.p) * tile.block_c, window.m * window.p
    registers = band / threads + operand_registers(features, size) / threads + FLOAT32_REGISTERS * (terms - 1)
    return (
        registers <= most_registers
        # the gradient of the band is float32
        and max(features * size, band * REGISTER_BYTES) * terms <= SHARED_BYTES
        and window.t * window.m / threads <= BACKWARD_LOGITS
        and window.t * window.p / threads <= BACKWARD_WINDOW
        and (window.m <= BACKWARD_TARGETS or tile.cells_h * tile.cells_w == 1)
    )


def _source_gradient_fits(problem: TileProblem, tile: Tile, most_registers: int) -> bool:
    size, threads = problem.element_size, WARP_SIZE * tile.num_warps
    channels, targets = source_blocks(problem, tile)
    sources = reach(problem.spec, tile.cells_h, tile.cells_w, tile.vector).s
    # every warp holds the whole band
    operands = operand_registers(targets * channels, size) / threads + operand_registers(targets * sources, size) / WARP_SIZE
    shared = targets * (channels + sources) * size * operand_terms(size)
    return sources * channels / threads + operands <= most_registers and shared <= SHARED_BYTES
