"""The gradient to the logits in NCHW as sums over channels, for integer scales, in two launches.

The first keeps the sums of a run (row_runs.py), one for each of its weights, in registers while it loops over channels. The second turns
the gradients to the weights into those to the logits.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..common.blocks import align_sizes, align_strides, find_tile, image, split_group
from ..common.records import Features, Layout, Logits, Sizes, Window
from ..common.vectors import as_offset, load_vector
from ..common.window import group_logits, logit_addresses, logit_offset, place_targets, store_logit_gradient, widen_taps
from ..launch import Launch
from ..tiles.geometry import TileProblem, multiple
from ..tiles.time_model import find_device
from .row_runs import (
    RESIDENT,
    WARP_SIZE,
    WARPS,
    Runs,
    align_cells,
    align_rows,
    build_launch,
    count_programs,
    divide_runs,
    find_first_row,
    find_runs,
    find_sources,
    load_sources,
    store_cells,
)
from .tap_sums import tile_of_weights

# most rows of programs of twice as many warps, over those of others
MOST_ROWS = 1.05


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
    ng, _, u, _v, q, r = find_runs(m % M, sizes, WINDOW, RUNS)
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
        _, _, u, _v, q, r = find_runs(tl.arange(0, M).to(LAYOUT.index), sizes, WINDOW, RUNS)
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


def share_runs(problem: TileProblem, runs: Runs) -> Runs:
    """Return the division with as many warps that share runs as give every multiprocessor enough programs, and then twice as many rows."""
    multiprocessors = find_device(problem.capability).multiprocessors
    while runs.parts < WARPS and runs.rows > 1 and problem.channels % (2 * runs.parts) == 0:
        if count_programs(problem, runs) >= RESIDENT * multiprocessors:
            break
        runs = runs._replace(parts=2 * runs.parts, rows=runs.rows // 2)
    # a program also reads the rows of x around its own
    wider = runs._replace(rows=2 * runs.rows)
    filled = multiple(problem.height, wider.rows) <= MOST_ROWS * multiple(problem.height, runs.rows)
    return wider if filled and count_programs(problem, wider) >= multiprocessors else runs


def row_gradient_launches(arguments: dict[str, Any], problem: TileProblem, window: Window, layout: Layout) -> list[Launch]:
    """Return the launches that fill dlogits; `arguments` are those of the operator, by name."""
    dlogits = gradients = arguments["dlogits"]
    if dlogits.ptr.dtype != torch.float32:
        scratch = torch.empty(dlogits.ptr.shape, dtype=torch.float32, device=dlogits.ptr.device)
        gradients = Logits(scratch, *scratch.stride())
    arguments = arguments | {"gradients": gradients}
    runs = share_runs(problem, divide_runs(problem, (gradients,)))
    first = build_launch(sum_row_gradients, arguments, count_programs(problem, runs), {"WINDOW": window, "LAYOUT": layout, "RUNS": runs})
    first = first._replace(num_warps=runs.parts * runs.rows * runs.steps * runs.cols // WARP_SIZE)
    spec = problem.spec
    tile = tile_of_weights(spec)
    programs = triton.cdiv(problem.height, tile.rows // spec.up) * triton.cdiv(problem.width, tile.cols // spec.up)
    constants = {"WINDOW": window, "HALO": tile, "LAYOUT": layout}
    return [first, build_launch(normalize_gradients, arguments, problem.batch * programs, constants)]
