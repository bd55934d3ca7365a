"""Forward and the gradient to the logits in NCHW as sums over the taps of a window, for integer scales.

A *run* is the targets of a thread: a row of neighbouring targets, whose windows share most of their sources. Its weights, or the gradients
to them, stay in registers, and the program loops over channels. Neighbouring threads have neighbouring runs, so that a warp reads and
writes rows of pixels. Neither shared memory nor matrix units are needed, and sources are read from L2 about once.

Loads of sources need no masks. A window that begins above the map, or ends below it, reads rows that are moved into the map, with the
weights of the taps that they belong to. A column outside the map is replaced by one inside it, with a weight of zero.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..geometry import Spec
from .blocks import align_sizes, align_strides, aligned, find_tile, image, split_group
from .launch import Launch
from .records import Features, Layout, Logits, Sizes, Window
from .special import exp, log
from .tap_sums import MERGES_SUMS, has_room, target_bytes, tile_of_weights
from .taps import clamp
from .tile_geometry import KernelName, TileProblem, multiple, share_in_map, source_bytes
from .tile_time import find_device
from .vectors import as_offset, load_vector, store_vector
from .window import (
    group_logits,
    is_left_out,
    logit_addresses,
    logit_offset,
    place_targets,
    score,
    store_logit_gradient,
    weight,
    widen_taps,
)

# bytes of the larger map from which on there are enough programs for a device
SMALLEST = 2**26
# share of the places of threads that have targets; with fewer, products take fewer instructions
LEAST_FILLED = 0.6
# most weights of a thread; more do not fit into its registers
MOST_WEIGHTS = 100
MAX_REGISTERS = 128
WARPS, WARP_SIZE = 4, 32
# bytes of a line of memory
LINE = 128
# programs that a multiprocessor holds with this number of registers
RESIDENT = 4
# time to compute the weights of a program, in channels
WEIGHTS = 10


class Runs(NamedTuple):
    """The division of the targets among threads and programs. A constant."""

    cells: int  # neighbouring cells of a thread
    steps: int  # sub-rows of a program: all of them, or one
    rows: int  # of cells of a program
    cols: int  # of runs
    lead: int  # columns of x before the first window of a run, a multiple of the vector
    vectors: int  # loads of a row of x
    x_vector: int  # pixels of such a load
    y_vector: int  # pixels of y, or of its gradient
    align: int  # every row of logits begins at a multiple of this number of elements
    split: int  # programs of forward that share a run, each for its channels
    parts: int  # warps of a program of the gradient to the logits that do


@triton.jit
def find_runs(m, sizes: Sizes, WINDOW: tl.constexpr, RUNS: tl.constexpr):
    """Return the group of this program counted over all images, its part of the channels, and the sub-row and the first cell of runs m."""
    PROGRAMS: tl.constexpr = WINDOW.up // RUNS.steps
    pid = tl.program_id(0)
    part = pid % RUNS.split
    pid = pid // RUNS.split
    # the threads of a warp share sources
    u = pid % PROGRAMS * RUNS.steps + m // RUNS.cols % RUNS.steps
    q0, r0, ng = find_tile(pid // PROGRAMS, tl.cdiv(sizes.hq, RUNS.rows), tl.cdiv(sizes.wq, RUNS.cols * RUNS.cells))
    q, r = q0 * RUNS.rows + m // (RUNS.cols * RUNS.steps), (r0 * RUNS.cols + m % RUNS.cols) * RUNS.cells
    return ng, part, u, q, r


@triton.jit
def find_first_row(q, sizes: Sizes, WINDOW: tl.constexpr):
    """Return the first row of sources that runs in row q of cells read, and by how many taps it is moved to lie in the map."""
    above = tl.minimum(q, sizes.hq - 1) * WINDOW.down - WINDOW.kernel_size // 2
    first = clamp(above, 0, sizes.h - WINDOW.kernel_size)
    return first, first - above


@triton.jit
def find_sources(q, r, sizes: Sizes, x: Features, c, WINDOW: tl.constexpr, RUNS: tl.constexpr):
    """Return the offsets of the first row of sources of runs in channel c, one for each vector, and by how many taps this row is moved."""
    DOWN: tl.constexpr = WINDOW.down
    VECTOR: tl.constexpr = RUNS.x_vector
    VECTORS: tl.constexpr = RUNS.vectors
    first, moved = find_first_row(q, sizes, WINDOW)
    places = ()
    for p in tl.static_range(VECTORS):
        col = clamp((r * DOWN - RUNS.lead) // VECTOR + p, 0, sizes.w // VECTOR - 1) * VECTOR
        places = places + (as_offset(c * x.stride_c + first * x.stride_h + col * x.stride_w),)
    return places, moved


@triton.jit
def load_sources(ptr, places, RUNS: tl.constexpr):
    """Return the sources of runs in a row; `ptr` is the address of this row in the first runs of the map."""
    VECTORS: tl.constexpr = RUNS.vectors
    sources = ()
    for p in tl.static_range(VECTORS):
        sources = sources + load_vector(ptr + places[p], RUNS.x_vector)
    return sources


@triton.jit
def align_cells(sizes: Sizes, ALIGN: tl.constexpr):
    """Tell the compiler that rows of cells end at a multiple of ALIGN."""
    return Sizes(sizes.groups, sizes.c, sizes.h, sizes.w, sizes.ho, sizes.wo, sizes.hq, aligned(sizes.wq, ALIGN))


@triton.jit
def align_rows(logits: Logits, ALIGN: tl.constexpr):
    """Tell the compiler at what multiples rows of logits begin, which the host has found."""
    n, c, u, v = (
        aligned(logits.stride_n, ALIGN),
        aligned(logits.stride_c, ALIGN),
        aligned(logits.stride_u, ALIGN),
        aligned(logits.stride_v, ALIGN),
    )
    return Logits(logits.ptr, n, c, u, v, aligned(logits.stride_h, ALIGN), logits.stride_w)


@triton.jit
def load_cells(ptr, offset, stride_w, q, r, sizes: Sizes, CELLS: tl.constexpr):
    """Return what lies at each offset and in the neighbouring cells, in float32; zeros where a cell does not exist."""
    if CELLS == 1:
        return (tl.load(ptr + as_offset(offset), mask=(q < sizes.hq) & (r < sizes.wq), other=0.0).to(tl.float32),)
    else:
        cell = tl.arange(0, 2)[None, :]
        exists = (q < sizes.hq)[:, None] & (r[:, None] + cell < sizes.wq)
        a, b = tl.split(tl.load(ptr + as_offset(offset[:, None] + cell * stride_w), mask=exists, other=0.0).to(tl.float32))
        return a, b


@triton.jit
def store_cells(ptr, offset, stride_w, q, r, values, sizes: Sizes, CELLS: tl.constexpr):
    """Store values of neighbouring cells, if they exist."""
    if CELLS == 1:
        tl.store(ptr + as_offset(offset), values[0].to(ptr.dtype.element_ty), mask=(q < sizes.hq) & (r < sizes.wq))
    else:
        cell = tl.arange(0, 2)[None, :]
        exists = (q < sizes.hq)[:, None] & (r[:, None] + cell < sizes.wq)
        tl.store(ptr + as_offset(offset[:, None] + cell * stride_w), tl.join(values[0], values[1]).to(ptr.dtype.element_ty), mask=exists)


@triton.jit
def lse_offset(sizes: Sizes, u, v, q, r, WINDOW: tl.constexpr):
    """Return the offset of the log-sum-exp of a window in those of its group."""
    return ((u * WINDOW.up + v) * sizes.hq + q) * sizes.wq + r


@triton.jit
def tap_scores(first, tap, u, v, q, r, logits: Logits, sizes: Sizes, WINDOW: tl.constexpr, CELLS: tl.constexpr):
    """Return the unnormalised log-weights of a tap in the windows of neighbouring cells, minus infinity where it is left out."""
    loaded = load_cells(logits.ptr, first + tap * logits.stride_c, logits.stride_w, q, r, sizes, CELLS)
    scores = ()
    for cell in tl.static_range(CELLS):
        s = score(loaded[cell], WINDOW)
        if WINDOW.border == "renormalize":
            s = tl.where(is_left_out(q * WINDOW.up + u, (r + cell) * WINDOW.up + v, tap, sizes, WINDOW), -float("inf"), s)
        scores = scores + (s,)
    return scores


@triton.jit
def sum_exponentials(first, u, v, q, r, logits: Logits, sizes: Sizes, WINDOW: tl.constexpr, CELLS: tl.constexpr):
    """Return the log-sum-exp of the scores of the windows of neighbouring cells."""
    K: tl.constexpr = WINDOW.kernel_size
    # the largest score of each window and its sum; finite, because all taps of the first rows may be left out
    found = ()
    for _ in tl.static_range(CELLS):
        found = found + (tl.full(q.shape, -3e38, tl.float32), tl.zeros(q.shape, tl.float32))
    # a loop that is not unrolled, because the compiler takes a time quadratic in the number of loads
    for ky in range(K):
        scores = ()
        for kx in tl.static_range(K):
            scores = scores + tap_scores(first, ky * K + kx, u, v, q, r, logits, sizes, WINDOW, CELLS)
        later = ()
        for cell in tl.static_range(CELLS):
            top = found[2 * cell]
            for kx in tl.static_range(K):
                top = tl.maximum(top, scores[kx * CELLS + cell])
            total = found[2 * cell + 1] * exp(found[2 * cell] - top)
            for kx in tl.static_range(K):
                total += exp(scores[kx * CELLS + cell] - top)
            later = later + (top, total)
        found = later
    sums = ()
    for cell in tl.static_range(CELLS):
        sums = sums + (found[2 * cell] + log(found[2 * cell + 1]),)
    return sums


@triton.jit
def move_tap(moved, KY: tl.constexpr, KX: tl.constexpr, r, sizes: Sizes, WINDOW: tl.constexpr, CELLS: tl.constexpr):
    """Return the tap that reads column KX of row KY of the sources of a run, and for each of its cells whether there is one in the map."""
    K: tl.constexpr = WINDOW.kernel_size
    ky = moved + KY
    reads = ()
    for cell in tl.static_range(CELLS):
        j = (r + cell) * WINDOW.down + (KX - K // 2)
        reads = reads + ((ky >= 0) & (ky < K) & (j >= 0) & (j < sizes.w),)
    return clamp(ky, 0, K - 1) * K + KX, reads


@triton.jit
def sum_rows(
    sizes: Sizes,
    x: Features,  # [N, G * C, H, W]
    logits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    y: Features,  # [N, G * C, HO, WO]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    WINDOW: tl.constexpr,
    LAYOUT: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Fill y and, where weights are normalized, the log-sum-exp of every window."""
    K: tl.constexpr = WINDOW.kernel_size
    DOWN: tl.constexpr = WINDOW.down
    CELLS: tl.constexpr = RUNS.cells
    UP: tl.constexpr = WINDOW.up
    TARGETS: tl.constexpr = CELLS * UP
    VECTOR: tl.constexpr = RUNS.y_vector
    # columns of the first load before the first window
    AHEAD: tl.constexpr = RUNS.lead - K // 2
    sizes = align_cells(align_sizes(sizes, LAYOUT), RUNS.align)
    x = align_strides(x, 1, LAYOUT.x_align)
    y = align_strides(y, 1, LAYOUT.y_align)
    m = tl.arange(0, RUNS.rows * RUNS.steps * RUNS.cols).to(LAYOUT.index)
    ng, part, u, q, r = find_runs(m, sizes, WINDOW, RUNS)
    n, g = split_group(ng, sizes)
    lse_ptr += ng.to(tl.int64) * WINDOW.up * WINDOW.up * sizes.hq * sizes.wq
    places, moved = find_sources(q, r, sizes, x, 0, WINDOW, RUNS)
    logits = widen_taps(group_logits(align_rows(logits, RUNS.align), n, g, WINDOW), LAYOUT)
    weights = ()
    for v in tl.static_range(UP):
        first = logit_offset(logits, u, v, q, r)
        lse = (tl.zeros(q.shape, tl.float32),) * CELLS
        if WINDOW.normalized:
            lse = sum_exponentials(first, u, v, q, r, logits, sizes, WINDOW, CELLS)
            if part == 0:
                store_cells(lse_ptr, lse_offset(sizes, u, v, q, r, WINDOW), 1, q, r, lse, sizes, CELLS)
        for ky in tl.static_range(K):
            for kx in tl.static_range(K):
                tap, reads = move_tap(moved, ky, kx, r, sizes, WINDOW, CELLS)
                loaded = load_cells(logits.ptr, first + tap * logits.stride_c, logits.stride_w, q, r, sizes, CELLS)
                for cell in tl.static_range(CELLS):
                    weights = weights + (tl.where(reads[cell], weight(loaded[cell], lse[cell], WINDOW), 0.0),)

    x = image(x, n, g * sizes.c)
    y = image(y, n, g * sizes.c)
    row, col = q * UP + u, r * UP
    to = as_offset(row * y.stride_h + col * y.stride_w)
    channels = tl.cdiv(sizes.c, RUNS.split)
    start = part * channels
    x_plane, y_plane = x.ptr + start.to(LAYOUT.index) * x.stride_c, y.ptr + start.to(LAYOUT.index) * y.stride_c
    for _c in range(start, tl.minimum(start + channels, sizes.c)):
        sums = ()
        for _ in tl.static_range(TARGETS):
            sums = sums + (tl.zeros(row.shape, tl.float32),)
        for ky in tl.static_range(K):
            sources = load_sources(x_plane + ky * x.stride_h, places, RUNS)
            added = ()
            for target in tl.static_range(TARGETS):
                s = sums[target]
                for kx in tl.static_range(K):
                    s += weights[((target % UP * K + ky) * K + kx) * CELLS + target // UP] * sources[AHEAD + target // UP * DOWN + kx]
                added = added + (s,)
            sums = added
        for target in tl.static_range(0, TARGETS, VECTOR):
            exists = (row < sizes.ho) & (col + target < sizes.wo)
            store_vector(y_plane + target * y.stride_w + to, exists, sums, target, VECTOR)
        x_plane += x.stride_c
        y_plane += y.stride_c


@triton.jit
def sum_row_gradients(
    sizes: Sizes,
    x: Features,  # [N, G * C, H, W]
    dy: Features,  # [N, G * C, HO, WO]
    gradients: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    WINDOW: tl.constexpr,
    LAYOUT: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Fill the sums of all windows: the gradients to the weights by which they would read the rows of sources that a run reads."""
    K: tl.constexpr = WINDOW.kernel_size
    DOWN: tl.constexpr = WINDOW.down
    CELLS: tl.constexpr = RUNS.cells
    UP: tl.constexpr = WINDOW.up
    TARGETS: tl.constexpr = CELLS * UP
    VECTOR: tl.constexpr = RUNS.y_vector
    AHEAD: tl.constexpr = RUNS.lead - K // 2
    sizes = align_cells(align_sizes(sizes, LAYOUT), RUNS.align)
    x = align_strides(x, 1, LAYOUT.x_align)
    dy = align_strides(dy, 1, LAYOUT.y_align)
    M: tl.constexpr = RUNS.rows * RUNS.steps * RUNS.cols
    PARTS: tl.constexpr = RUNS.parts
    m = tl.arange(0, PARTS * M).to(LAYOUT.index)
    ng, _, u, q, r = find_runs(m % M, sizes, WINDOW, RUNS)
    n, g = split_group(ng, sizes)
    places, _ = find_sources(q, r, sizes, x, m // M, WINDOW, RUNS)
    x = image(x, n, g * sizes.c)
    dy = image(dy, n, g * sizes.c)
    # targets that do not exist take gradients of others, and their sums are not used
    row, col = tl.minimum(q * UP + u, sizes.ho - 1), r * UP
    starts = ()
    for target in tl.static_range(0, TARGETS, VECTOR):
        last = sizes.wo // VECTOR * VECTOR - VECTOR
        near = tl.minimum(col + target, last)
        starts = starts + (as_offset(m // M * dy.stride_c + row * dy.stride_h + near * dy.stride_w),)
    sums = ()
    for _ in tl.static_range(TARGETS * K * K):
        sums = sums + (tl.zeros(row.shape, tl.float32),)
    x_plane, dy_plane = x.ptr, dy.ptr
    for _c in range(0, sizes.c, PARTS):
        loaded = ()
        for p in tl.static_range(TARGETS // VECTOR):
            loaded = loaded + load_vector(dy_plane + starts[p], VECTOR)
        added = ()
        for ky in tl.static_range(K):
            sources = load_sources(x_plane + ky * x.stride_h, places, RUNS)
            for target in tl.static_range(TARGETS):
                for kx in tl.static_range(K):
                    source = sources[AHEAD + target // UP * DOWN + kx]
                    added = added + (sums[(ky * TARGETS + target) * K + kx] + loaded[target] * source,)
        sums = added
        x_plane += PARTS * x.stride_c
        dy_plane += PARTS * dy.stride_c

    if PARTS > 1:
        totals = ()
        for i in tl.static_range(TARGETS * K * K):
            totals = totals + (tl.sum(tl.reshape(sums[i], (PARTS, M)), axis=0),)
        sums = totals
        _, _, u, q, r = find_runs(tl.arange(0, M).to(LAYOUT.index), sizes, WINDOW, RUNS)
    gradients = widen_taps(group_logits(align_rows(gradients, RUNS.align), n, g, WINDOW), LAYOUT)
    for v in tl.static_range(UP):
        first = logit_offset(gradients, u, v, q, r)
        for ky in tl.static_range(K):
            for kx in tl.static_range(K):
                stored = ()
                for cell in tl.static_range(CELLS):
                    stored = stored + (sums[(ky * TARGETS + cell * UP + v) * K + kx],)
                ptr = gradients.ptr + (ky * K + kx) * gradients.stride_c
                store_cells(ptr, first, gradients.stride_w, q, r, stored, sizes, CELLS)


@triton.jit
def normalize_gradients(
    sizes: Sizes,
    logits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    gradients: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    dlogits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    WINDOW: tl.constexpr,
    HALO: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Fill dlogits from the sums of windows, which may be in the same memory; one program computes those of a tile of cells."""
    UP: tl.constexpr = WINDOW.up
    CELLS_H: tl.constexpr = HALO.rows // UP
    CELLS_W: tl.constexpr = HALO.cols // UP
    K: tl.constexpr = WINDOW.kernel_size
    q0, r0, ng = find_tile(tl.program_id(0), tl.cdiv(sizes.hq, CELLS_H), tl.cdiv(sizes.wq, CELLS_W))
    n, g = split_group(ng, sizes)
    m = tl.arange(0, HALO.m).to(LAYOUT.index)
    i, j, u, v, q, r = place_targets(m, HALO, WINDOW, LAYOUT)
    row, col, q, r = q0 * HALO.rows + i, r0 * HALO.cols + j, q0 * CELLS_H + q, r0 * CELLS_W + r
    exists = (m < HALO.rows * HALO.cols) & (q < sizes.hq) & (r < sizes.wq)
    gradients = group_logits(gradients, n, g, WINDOW)
    t = tl.arange(0, HALO.t).to(LAYOUT.index)
    ky = (t // K)[:, None] - find_first_row(q, sizes, WINDOW)[1][None, :]
    j = (r * WINDOW.down)[None, :] + (t % K - K // 2)[:, None]
    # others, and those of targets that a size cuts off, are zero
    read = (t < K * K)[:, None] & (ky >= 0) & (ky < K) & (j >= 0) & (j < sizes.w) & (exists & (row < sizes.ho) & (col < sizes.wo))[None, :]
    address = logit_addresses(gradients, ky * K + (t % K)[:, None], logit_offset(gradients, u, v, q, r)[None, :], WINDOW, LAYOUT)
    dw = tl.load(address, mask=read, other=0.0)
    # a thread may store where another one loads
    tl.debug_barrier()
    logits = group_logits(logits, n, g, WINDOW)
    dlogits = group_logits(dlogits, n, g, WINDOW)
    lse_ptr += ng.to(tl.int64) * UP * UP * sizes.hq * sizes.wq
    store_logit_gradient(sizes, logits, lse_ptr, dlogits, dw, row, col, u, v, q, r, exists, WINDOW, HALO, LAYOUT)


def larger_bytes(problem: TileProblem) -> int:
    """Return the bytes of the larger map of a call."""
    return max(source_bytes(problem), target_bytes(problem))


def sums_rows(kernel: KernelName, problem: TileProblem) -> bool:
    """Return whether forward or the gradient to the logits sums over rows, and has no tile."""
    spec = problem.spec
    whole = (spec.up == 1 or spec.down == 1) and spec.border in ("zero", "renormalize") and spec.up * spec.taps <= MOST_WEIGHTS
    # a window has as many rows in the map
    fits = (problem.height - 1) * spec.down + 1 >= spec.kernel_size
    # in 16 bits, products with matrix units take fewer instructions unless they are few
    wins = problem.element_size == 4 or (spec.down > 1 and kernel == "logit_gradient" and has_room(problem))
    if not (whole and fits and wins) or MERGES_SUMS or problem.channels_last or larger_bytes(problem) < SMALLEST:
        return False
    rows, cols = divide_threads(problem)
    return share_in_map(problem, rows, cols * count_cells(spec)) >= LEAST_FILLED


def count_cells(spec: Spec) -> int:
    """Return the neighbouring cells of a thread."""
    return 2 if 2 * max(spec.up, spec.down) <= 4 and 2 * spec.up * spec.taps <= MOST_WEIGHTS else 1


def count_steps(spec: Spec) -> int:
    """Return the sub-rows of a program, whose number of threads is a power of two."""
    return spec.up if spec.up & (spec.up - 1) == 0 else 1


def divide_threads(problem: TileProblem) -> tuple[int, int]:
    """Return the rows of cells of a program, and the runs in each of them."""
    cells, steps = count_cells(problem.spec), count_steps(problem.spec)
    threads = WARPS * WARP_SIZE // steps
    width = cells * problem.spec.down * problem.element_size

    def count_lines(cols: int) -> float:
        """Return the lines of memory that a load of x touches in all warps."""
        programs = triton.cdiv(problem.height, threads // cols) * triton.cdiv(problem.width, cols * cells)
        return programs * max(1, WARP_SIZE // steps // cols) * (1 + min(cols, WARP_SIZE) * width / LINE)

    cols = min((cols for cols in (8, 16, 32) if cols <= threads), key=count_lines)
    return threads // cols, cols


def divide_runs(problem: TileProblem, logits: tuple[Logits, ...]) -> Runs:
    """Return the division of a call among threads and programs, none of which share channels."""
    spec = problem.spec
    cells, (rows, cols) = count_cells(spec), divide_threads(problem)
    x_vector, y_vector = math.gcd(problem.x_align, cells * spec.down, 4), math.gcd(problem.y_align, cells * spec.up, 4)
    steps_of_rows = [step for record in logits for step in record[1:-1]] if all(record.stride_w == 1 for record in logits) else [1]
    align = math.gcd(2, problem.width, *steps_of_rows)
    lead = multiple(spec.kernel_size // 2, x_vector)
    vectors = (lead + (cells - 1) * spec.down + spec.kernel_size // 2) // x_vector + 1
    return Runs(cells, count_steps(spec), rows, cols, lead, vectors, x_vector, y_vector, align, 1, 1)


def count_programs(problem: TileProblem, runs: Runs) -> int:
    """Return the programs of a launch without shared channels."""
    tiles = triton.cdiv(problem.height, runs.rows) * triton.cdiv(problem.width, runs.cols * runs.cells)
    return problem.batch * tiles * (problem.spec.up // runs.steps)


def split_channels(problem: TileProblem, runs: Runs) -> Runs:
    """Return the division with the number of programs that share the channels of a run, each of which computes all of its weights."""
    multiprocessors, programs = find_device(problem.capability).multiprocessors, count_programs(problem, runs)
    enough = min(problem.channels, triton.cdiv(RESIDENT * multiprocessors, programs))

    def cost(split: int) -> int:
        """Return the channels that the multiprocessor with the most programs computes."""
        return triton.cdiv(programs * split, multiprocessors) * (WEIGHTS + triton.cdiv(problem.channels, split))

    return runs._replace(split=min(range(enough, min(problem.channels, 2 * enough + 2) + 1), key=cost))


def share_runs(problem: TileProblem, runs: Runs) -> Runs:
    """Return the division with as many warps that share runs as give every multiprocessor enough programs."""
    multiprocessors = find_device(problem.capability).multiprocessors
    while runs.parts < WARPS and runs.rows > 1 and problem.channels % (2 * runs.parts) == 0:
        if count_programs(problem, runs) >= RESIDENT * multiprocessors:
            break
        runs = runs._replace(parts=2 * runs.parts, rows=runs.rows // 2)
    return runs


def row_sum_launches(arguments: dict[str, Any], problem: TileProblem, window: Window, layout: Layout) -> list[Launch]:
    """Return the launch that fills y and the log-sum-exp; `arguments` are those of the operator, by name."""
    runs = split_channels(problem, divide_runs(problem, (arguments["logits"],)))
    return [_launch(sum_rows, arguments, count_programs(problem, runs) * runs.split, {"WINDOW": window, "LAYOUT": layout, "RUNS": runs})]


def row_gradient_launches(arguments: dict[str, Any], problem: TileProblem, window: Window, layout: Layout) -> list[Launch]:
    """Return the launches that fill dlogits; `arguments` are those of the operator, by name."""
    dlogits = gradients = arguments["dlogits"]
    if dlogits.ptr.dtype != torch.float32:
        scratch = torch.empty(dlogits.ptr.shape, dtype=torch.float32, device=dlogits.ptr.device)
        gradients = Logits(scratch, *scratch.stride())
    arguments = arguments | {"gradients": gradients}
    runs = share_runs(problem, divide_runs(problem, (gradients,)))
    first = _launch(sum_row_gradients, arguments, count_programs(problem, runs), {"WINDOW": window, "LAYOUT": layout, "RUNS": runs})
    spec = problem.spec
    tile = tile_of_weights(spec)
    programs = triton.cdiv(problem.height, tile.rows // spec.up) * triton.cdiv(problem.width, tile.cols // spec.up)
    constants = {"WINDOW": window, "HALO": tile, "LAYOUT": layout}
    return [first, _launch(normalize_gradients, arguments, problem.batch * programs, constants)]


def _launch(kernel: triton.JITFunction, arguments: dict[str, Any], programs: int, constants: dict[str, Any]) -> Launch:
    given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    return Launch(kernel, (programs, 1, 1), given, constants, WARPS, 1, MAX_REGISTERS)
