"""Estimates of the registers and of the shared memory of a kernel, which bound the programs that a multiprocessor holds.

They serve the choice of a tile, which must not compile the candidates. Their terms are the values that a thread holds at the same time;
the factors were fitted to compiled kernels (tests/support/fit_tile_time.py). limits.py decides which tiles fit at all.
"""

import math
from typing import NamedTuple

from .geometry import KernelName, Tile, TileProblem, as_read, halo, reach, run_alignments, run_vector
from .limits import REGISTER_BYTES, WARP_SIZE, SourceBlocks, is_tall, operand_terms, source_blocks
from .memory import NARROWEST_COPY
from .work import find_walk, takes_four_warps

# the limit of Launch.options
MOST_REGISTERS = 255


class Resources(NamedTuple):
    """What a program takes from its multiprocessor."""

    registers: int  # per thread
    shared: int  # bytes


def estimate_resources(kernel: KernelName, problem: TileProblem, tile: Tile) -> Resources:
    """Return the estimated resources of a kernel; all programs of a launch of both gradients take the most that one of them needs."""
    problem = as_read(kernel, problem, tile)
    if kernel == "forward":
        return forward_resources(problem, tile)
    if kernel == "source_gradient" and tile.steps > 1:
        return walk_resources(problem, tile)
    needed = []
    if kernel != "source_gradient":
        needed.append(logit_gradient_resources(problem, tile))
    if kernel != "logit_gradient":
        blocks = source_blocks(kernel, problem, tile)
        needed.append(source_gradient_resources(problem, tile, blocks, is_tall(problem, tile, blocks.channels)))
    return Resources(*map(max, zip(*needed, strict=True)))


def forward_resources(problem: TileProblem, tile: Tile) -> Resources:
    """Return the estimated resources of the forward kernel."""
    size, threads, channels = problem.element_size, WARP_SIZE * tile.num_warps, tile.block_c
    x_align, _ = run_alignments(problem, tile)
    window = halo(problem.spec, tile.cells_h, tile.cells_w, run_vector(problem, tile, problem.x_align))
    tall = problem.channels_last and window.rows * window.cols < 64
    newer = takes_four_warps(problem, tile, window.m if problem.channels_last and not tall else channels)
    band, features, result = window.p * window.m, window.p * channels, window.m * channels
    stored = _vectors(problem.channels_last, result, threads, window.cols, problem.y_align)
    splits = (operand_terms(size) - 1) * (features + band) / threads
    loop = 28 + 1.1 * result / threads + 1.5 * splits + _vectors(problem.x_last, features, threads, window.width, x_align) + 3.4 * stored
    start = 33 + (4 * window.t * window.m + 0.3 * band) / threads
    buffers = _buffers(problem.x_last, size, tile, newer, window.width, x_align)
    turned = result if buffers > 1 and not tall else 0
    return _resources(max(loop, start), size * (buffers * features + band * operand_terms(size) + turned))


def logit_gradient_resources(problem: TileProblem, tile: Tile) -> Resources:
    """Return the estimated resources of the gradient to the logits."""
    size, threads, channels = problem.element_size, WARP_SIZE * tile.num_warps, tile.block_c
    x_align, y_align = run_alignments(problem, tile)
    window = halo(problem.spec, tile.cells_h, tile.cells_w, run_vector(problem, tile, problem.x_align))
    newer = takes_four_warps(problem, tile, window.p)
    band, features, gradients = window.p * window.m, window.p * channels, window.m * channels
    loads = _vectors(problem.x_last, features, threads, window.width, x_align)
    loads += _vectors(problem.channels_last, gradients, threads, window.cols, y_align)
    splits = (operand_terms(size) - 1) * (features + gradients) / threads
    # the sums of the tiles that a program computes later
    kept = (tile.steps - 1) * band / threads
    loop = 28 + 1.2 * band / threads + kept + 3 * loads + 1.3 * splits
    end = 17 + (2.8 * window.t * window.m + 2 * band) / threads + kept
    buffered = features * _buffers(problem.x_last, size, tile, newer, window.width, x_align)
    buffered += gradients * (_buffers(problem.channels_last, size, tile, newer, window.cols, y_align) + operand_terms(size) - 1)
    return _resources(max(loop, end), size * buffered)


def source_gradient_resources(problem: TileProblem, tile: Tile, blocks: SourceBlocks, tall: bool) -> Resources:
    """Return the estimated resources of the gradient to the features, with the channels as the rows of its products if `tall`."""
    size, threads = problem.element_size, WARP_SIZE * tile.num_warps
    _, y_align = run_alignments(problem, tile)
    reached = reach(problem.spec, tile.cells_h, tile.cells_w, run_vector(problem, tile, problem.y_align))
    newer = takes_four_warps(problem, tile, blocks.channels if tall else reached.s)
    band, gradients, result = blocks.targets * reached.s, blocks.targets * blocks.channels, reached.s * blocks.channels
    # every warp holds the whole band as operand of its own matrix instruction
    held = 0 if newer else band * size / REGISTER_BYTES / WARP_SIZE * operand_terms(size)
    loads = _vectors(problem.channels_last, gradients, threads, reached.width, y_align)
    registers = 44 + 1.4 * result / threads + 2.5 * held + 6.7 * loads + 0.5 * max(1, band / threads)
    registers += (15 + 1.4 * gradients / threads) * (operand_terms(size) - 1)
    buffered = _buffers(problem.channels_last, size, tile, newer, reached.width, y_align) * gradients + band
    return _resources(registers, size * buffered + REGISTER_BYTES * blocks.targets)


def walk_resources(problem: TileProblem, tile: Tile) -> Resources:
    """Return the estimated resources of programs that walk, which take all registers that they may have."""
    size, step = problem.element_size, find_walk(problem, tile)
    weights = step.s if size == 2 else 0
    return _resources(tile.max_registers, size * step.d * (tile.block_c + weights))


def _resources(registers: float, shared: float) -> Resources:
    return Resources(min(MOST_REGISTERS, round(registers)), round(shared))


def _vectors(last: bool, elements: int, threads: int, width: int, align: int) -> float:
    """Return the vectors of features, in rows of `width` locations unless channels are the fastest axis, of each thread."""
    return max(1.0, elements / threads / (align if last else math.gcd(width, align)))


def _buffers(last: bool, element_size: int, tile: Tile, newer: bool, width: int, align: int) -> int:
    """Return the copies of a block of features in shared memory: those of a pipeline, if its asynchronous copies are wide enough."""
    vector = align if last else math.gcd(width, align)
    if tile.num_stages == 1 or vector * element_size < NARROWEST_COPY:
        return 1
    return tile.num_stages if newer else tile.num_stages - 1
