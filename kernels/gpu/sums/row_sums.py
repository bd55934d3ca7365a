"""Forward in NCHW as a sum over the taps of a window, for integer scales.

The weights of a run (row_runs.py) stay in registers, and the program loops over channels. Neither shared memory nor matrix units are
needed, and sources are read from L2 about once.
"""

from typing import Any

import triton
import triton.language as tl

from ..common.blocks import align_sizes, align_strides, image, split_group
from ..common.records import Features, Layout, Logits, Sizes, Window
from ..common.special import exp, log
from ..common.vectors import advance, as_offset, store_vector
from ..common.window import group_logits, is_left_out, logit_offset, score, weight, widen_taps
from ..launch import Launch
from ..tiles.geometry import TileProblem
from ..tiles.time_model import find_device
from .row_runs import (
    RESIDENT,
    Runs,
    align_cells,
    align_rows,
    build_launch,
    count_programs,
    divide_runs,
    find_runs,
    find_sources,
    load_cells,
    load_sources,
    store_cells,
)
from .taps import clamp

# time to compute the weights of a program, in channels
WEIGHTS = 10


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
    # a loop that is not unrolled, because the compiler takes a time quadratic in the number of loads; it ends with the taps whose weights
    # are computed first, so that L1 has them
    for above in range(K):
        ky = K - 1 - above
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
    SUBS: tl.constexpr = RUNS.subs
    TARGETS: tl.constexpr = CELLS * SUBS
    VECTOR: tl.constexpr = RUNS.y_vector
    # columns of the first load before the first window
    AHEAD: tl.constexpr = RUNS.lead - K // 2
    sizes = align_cells(align_sizes(sizes, LAYOUT), RUNS.align)
    x = align_strides(x, 1, LAYOUT.x_align)
    y = align_strides(y, 1, LAYOUT.y_align)
    m = tl.arange(0, RUNS.rows * RUNS.steps * RUNS.cols).to(LAYOUT.index)
    ng, part, u, v, q, r = find_runs(m, sizes, WINDOW, RUNS)
    n, g = split_group(ng, sizes)
    lse_ptr += ng.to(tl.int64) * WINDOW.up * WINDOW.up * sizes.hq * sizes.wq
    places, moved = find_sources(q, r, sizes, x, 0, WINDOW, RUNS)
    logits = widen_taps(group_logits(align_rows(logits, RUNS.align), n, g, WINDOW), LAYOUT)
    weights = ()
    for sub in tl.static_range(SUBS):
        first = logit_offset(logits, u, v + sub, q, r)
        lse = (tl.zeros(q.shape, tl.float32),) * CELLS
        if WINDOW.normalized:
            lse = sum_exponentials(first, u, v + sub, q, r, logits, sizes, WINDOW, CELLS)
            if part == 0:
                store_cells(lse_ptr, lse_offset(sizes, u, v + sub, q, r, WINDOW), 1, q, r, lse, sizes, CELLS)
        for ky in tl.static_range(K):
            for kx in tl.static_range(K):
                tap, reads = move_tap(moved, ky, kx, r, sizes, WINDOW, CELLS)
                loaded = load_cells(logits.ptr, first + tap * logits.stride_c, logits.stride_w, q, r, sizes, CELLS)
                for cell in tl.static_range(CELLS):
                    weights = weights + (tl.where(reads[cell], weight(loaded[cell], lse[cell], WINDOW), 0.0),)

    x = image(x, n, g * sizes.c)
    y = image(y, n, g * sizes.c)
    row, col = q * UP + u, r * UP + v
    to = as_offset(row * y.stride_h + col * y.stride_w)
    channels = tl.cdiv(sizes.c, RUNS.split)
    start = part * channels
    places = advance(places, as_offset(start.to(LAYOUT.index) * x.stride_c))
    y_plane = y.ptr + start.to(LAYOUT.index) * y.stride_c
    for _c in range(start, tl.minimum(start + channels, sizes.c)):
        sums = ()
        for _ in tl.static_range(TARGETS):
            sums = sums + (tl.zeros(row.shape, tl.float32),)
        for ky in tl.static_range(K):
            sources = load_sources(x.ptr + ky * x.stride_h, places, RUNS)
            added = ()
            for target in tl.static_range(TARGETS):
                s = sums[target]
                for kx in tl.static_range(K):
                    s += weights[((target % SUBS * K + ky) * K + kx) * CELLS + target // SUBS] * sources[AHEAD + target // SUBS * DOWN + kx]
                added = added + (s,)
            sums = added
        for target in tl.static_range(0, TARGETS, VECTOR):
            # columns behind the first target of the run
            behind = target // SUBS * UP + target % SUBS
            exists = (row < sizes.ho) & (col + behind < sizes.wo)
            store_vector(y_plane + behind * y.stride_w + to, exists, sums, target, VECTOR)
        # offsets change and not the pointer, so that no sums of both wait in registers
        places = advance(places, x.stride_c)
        y_plane += y.stride_c


def split_channels(problem: TileProblem, runs: Runs) -> Runs:
    """Return the division with the number of programs that share the channels of a run, each of which computes all of its weights."""
    multiprocessors, programs = find_device(problem.capability).multiprocessors, count_programs(problem, runs)
    enough = max(1, min(problem.channels, RESIDENT * multiprocessors // programs))

    def cost(split: int) -> int:
        """Return the channels that the multiprocessor with the most programs computes."""
        return triton.cdiv(programs * split, multiprocessors) * (WEIGHTS + triton.cdiv(problem.channels, split))

    return runs._replace(split=min(range(enough, min(problem.channels, 2 * enough + 2) + 1), key=cost))


def row_sum_launches(arguments: dict[str, Any], problem: TileProblem, window: Window, layout: Layout) -> list[Launch]:
    """Return the launch that fills y and the log-sum-exp; `arguments` are those of the operator, by name."""
    runs = split_channels(problem, divide_runs(problem, (arguments["logits"],)))
    return [
        build_launch(sum_rows, arguments, count_programs(problem, runs) * runs.split, {"WINDOW": window, "LAYOUT": layout, "RUNS": runs})
    ]
