"""Backward as two products with banded matrices, in one launch, or in a launch for each gradient.

Several programs share a tile of cells. One computes the gradient to the logits from the targets m of the tile and the sources p of its
halo:

    dw = x dy^T [p, m], summed over channels; every window takes its band of dw; the gradient of the normalizer follows

A program may compute several tiles, one below the other, for every block of channels: most sources of a tile belong to the tile above it as
well, and come from L1. In NCHW, it stores the weights of its windows for a launch of the gradient to the features (weighing.py).

The others compute the gradient to the features from the sources s of the tile and the targets d whose windows reach into it:

    dx = B^T dy [s, c],  B[d, s] = weight with which target d read source s, rebuilt from its logit and the log-sum-exp of its window

In one launch, all run at the same time, so that dy is read from memory once. A launch for one gradient has a tile of its own and needs
fewer registers. The axes m, p, s and t (taps of a window) are rounded up to a power of two.
"""

import triton
import triton.language as tl

from ..common.blocks import (
    add_product,
    align_sizes,
    align_strides,
    expand,
    find_tile,
    image,
    is_inside,
    load,
    place_sources,
    product,
    split_group,
    store,
)
from ..common.records import Features, Logits, Sizes
from ..common.window import (
    align_logits,
    centre,
    group_logits,
    lse_address,
    place_targets,
    split_target,
    store_logit_gradient,
    store_weights,
    weight,
    window_offset,
)


@triton.jit
def compute_logit_gradient(
    sizes: Sizes,
    x: Features,
    logits: Logits,
    lse_ptr,
    dy: Features,
    dlogits: Logits,
    weights: Logits,
    n,
    g,
    q0,
    r0,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    HALO: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
):
    """Store the gradient to the logits of TILE.steps tiles, one below the other, from cell (q0, r0) on, and the weights if needed."""
    K: tl.constexpr = WINDOW.kernel_size
    UP: tl.constexpr = WINDOW.up
    M: tl.constexpr = HALO.m
    P: tl.constexpr = HALO.p
    ROWS: tl.constexpr = TILE.cells_h
    STEPS: tl.constexpr = TILE.steps
    m = tl.arange(0, M).to(LAYOUT.index)
    mi, mj, u, v, q, r = place_targets(m, HALO, WINDOW, LAYOUT)
    row, col, q, r = q0 * UP + mi, r0 * UP + mj, q0 + q, r0 + r
    real = (m < HALO.rows * HALO.cols) & (col < sizes.wo)
    p = tl.arange(0, P).to(LAYOUT.index)
    pi, pj = place_sources(p, HALO, LAYOUT)
    i, j = q0 * WINDOW.down - K // 2 + pi, r0 * WINDOW.down - HALO.lead + pj
    near = p < HALO.height * HALO.width
    sums = ()
    for _ in tl.static_range(STEPS):
        sums = sums + (tl.zeros([P, M], tl.float32),)
    for start in range(0, sizes.c, TILE.block_c):
        c = start + tl.arange(0, TILE.block_c).to(LAYOUT.index)
        added = ()
        # the windows of all tiles overlap, so that L1 holds most sources of a tile from the one above it
        for step in tl.static_range(STEPS):
            source_row, target_row = i + step * ROWS * WINDOW.down, row + step * ROWS * UP
            inside, output = near & is_inside(source_row, j, sizes), real & (target_row < sizes.ho)
            source = load(x, source_row, j, inside, c, sizes.c, LAYOUT.x_axis, HALO.width)
            gradient = load(dy, target_row, col, output, c, sizes.c, LAYOUT.y_axis, HALO.cols)
            if LAYOUT.x_axis == 1:
                source = tl.trans(source)
            if LAYOUT.y_axis == 0:
                gradient = tl.trans(gradient)
            added = added + (sums[step] + product(source, gradient, PRECISION),)
        sums = added
    # not before the loop, which has no registers for them
    read, written = align_logits(logits, WINDOW, LAYOUT), align_logits(dlogits, WINDOW, LAYOUT)
    read, written = group_logits(read, n, g, WINDOW), group_logits(written, n, g, WINDOW)
    t = tl.arange(0, HALO.t).to(LAYOUT.index)
    corner = centre(mi, WINDOW) * HALO.width + centre(mj, WINDOW) + HALO.lead - K // 2
    band = tl.minimum(corner[None, :] + (t // K * HALO.width + t % K)[:, None], P - 1).to(tl.int32)
    for step in tl.static_range(STEPS):
        dw = tl.gather(sums[step], band, axis=0)
        exists = (m < HALO.rows * HALO.cols) & (q + step * ROWS < sizes.hq) & (r < sizes.wq)
        target_row = row + step * ROWS * UP
        w = store_logit_gradient(sizes, read, lse_ptr, written, dw, target_row, col, u, v, q + step * ROWS, r, exists, WINDOW, HALO, LAYOUT)
        if NEED_WEIGHTS:
            taps = (t < K * K)[:, None] & exists[None, :]
            store_weights(group_logits(weights, n, g, WINDOW), w, t, target_row, col, taps)


@triton.jit
def compute_source_gradient(
    sizes: Sizes,
    logits: Logits,
    lse_ptr,
    dy: Features,
    dx: Features,
    map_ptr,
    matrix_ptr,
    n,
    q0,
    r0,
    part,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    REACH: tl.constexpr,
    BLOCKS: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TALL: tl.constexpr,
):
    """Store the gradient to the features of the tile whose first cell is (q0, r0), for one of its parts of the channels."""
    K: tl.constexpr = WINDOW.kernel_size
    UP: tl.constexpr = WINDOW.up
    AXIS: tl.constexpr = LAYOUT.x_axis
    S: tl.constexpr = REACH.s
    BLOCK_C: tl.constexpr = BLOCKS.channels
    BLOCK_D: tl.constexpr = BLOCKS.targets
    s = tl.arange(0, S).to(LAYOUT.index)
    i, j = q0 * WINDOW.down + s // REACH.cols, r0 * WINDOW.down + s % REACH.cols
    owned = (s < REACH.rows * REACH.cols) & (i < sizes.h) & (j < sizes.w)
    for start in range(part * BLOCK_C, sizes.c, TILE.split * BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(LAYOUT.index)
        block = tl.zeros([BLOCK_C, S] if TALL else [S, BLOCK_C], tl.float32)
        for d0 in range(0, REACH.height * REACH.width, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D).to(LAYOUT.index)
            row, col = q0 * UP - REACH.before + d // REACH.width, r0 * UP - REACH.lead + d % REACH.width
            reaching = (d < REACH.height * REACH.width) & (row >= 0) & (row < sizes.ho) & (col >= 0) & (col < sizes.wo)
            gradient = load(dy, row, col, reaching, c, sizes.c, LAYOUT.y_axis, REACH.width)
            if (LAYOUT.y_axis == 0) == TALL:
                gradient = tl.trans(gradient)
            row, col = tl.maximum(row, 0), tl.maximum(col, 0)
            ky = expand(i + K // 2, 1 - AXIS) - expand(centre(row, WINDOW), AXIS)
            kx = expand(j + K // 2, 1 - AXIS) - expand(centre(col, WINDOW), AXIS)
            band = (ky.to(tl.uint32) < K) & (kx.to(tl.uint32) < K) & expand(reaching, AXIS)
            l = tl.load(
                logits.ptr + expand(window_offset(logits, row, col, WINDOW), AXIS) + (ky * K + kx) * logits.stride_c,
                mask=band,
                other=-float("inf") if WINDOW.normalized else 0.0,
            ).to(tl.float32)
            lse = tl.zeros([BLOCK_D], tl.float32)
            if WINDOW.normalized:
                u, v, q, r = split_target(row, col, WINDOW)
                lse = tl.load(lse_address(lse_ptr, sizes, 0, u, v, q, r, WINDOW), mask=reaching, other=0.0)
            b = weight(l, expand(lse, AXIS), WINDOW)
            if WINDOW.normalizer == "sigmoid":
                b = tl.where(band, b, 0.0)
            b = b.to(dy.ptr.dtype.element_ty)
            if AXIS == 1:
                b = tl.trans(b)
            if TALL:
                block += product(gradient, b, PRECISION)
            else:
                block += product(tl.trans(b), gradient, PRECISION)
        if (AXIS == 0) == TALL:
            block = tl.trans(block)
        if WIDTH:
            block = add_product(block, map_ptr, matrix_ptr, n, i, j, owned, c, sizes.c, sizes, WIDTH, PRECISION)
        store(dx, i, j, owned, c, sizes.c, block, AXIS, REACH.cols)


@triton.jit
def banded_backward(
    sizes: Sizes,
    x: Features,  # [N, G * C, H, W]
    logits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    dy: Features,  # [N, G * C, HO, WO]
    dx: Features,  # [N, G * C, H, W]
    dlogits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    weights: Logits,  # [N, G * K * K, UP, UP, HQ, WQ], for a launch of the gradient to the features that follows
    map_ptr,  # [N, H, W, WIDTH], whose product with the matrix is added to dx; None without one
    matrix_ptr,  # [WIDTH, G * C]
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    HALO: tl.constexpr,
    REACH: tl.constexpr,
    BLOCKS: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DLOGITS: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    TALL: tl.constexpr,  # whether channels are the rows of the product of the gradient to the features
):
    """Fill dx, dlogits and the weights if needed; one program computes the gradient to the logits of its tiles, or a part of that to x."""
    ROLES: tl.constexpr = NEED_DLOGITS + NEED_DX * TILE.split
    sizes = align_sizes(sizes, LAYOUT)
    x = align_strides(x, LAYOUT.x_axis, LAYOUT.x_align)
    dx = align_strides(dx, LAYOUT.x_axis, LAYOUT.x_align)
    dy = align_strides(dy, LAYOUT.y_axis, LAYOUT.y_align)
    tiles_w = tl.cdiv(sizes.wq, TILE.cells_w)
    tiles_h = tl.cdiv(sizes.hq, TILE.cells_h * TILE.steps)
    pid = tl.program_id(0)
    role = pid % ROLES
    pid = pid // ROLES
    q0, r0, ng = find_tile(pid, tiles_h, tiles_w)
    q0 *= TILE.cells_h * TILE.steps
    r0 *= TILE.cells_w
    n, g = split_group(ng, sizes)
    c = g * sizes.c
    x = image(x, n, c)
    dy = image(dy, n, c)
    lse_ptr += ng.to(tl.int64) * WINDOW.up * WINDOW.up * sizes.hq * sizes.wq
    if NEED_DLOGITS and role == ROLES - 1:
        compute_logit_gradient(
            sizes, x, logits, lse_ptr, dy, dlogits, weights, n, g, q0, r0, WINDOW, TILE, HALO, LAYOUT, PRECISION, NEED_WEIGHTS
        )
    elif NEED_DX:
        if WIDTH:
            matrix_ptr += c
        # with strides that are constants, this gradient takes more registers
        gathered, dx = group_logits(logits, n, g, WINDOW), image(dx, n, c)
        compute_source_gradient(
            sizes,
            gathered,
            lse_ptr,
            dy,
            dx,
            map_ptr,
            matrix_ptr,
            n,
            q0,
            r0,
            role,
            WIDTH,
            WINDOW,
            TILE,
            REACH,
            BLOCKS,
            LAYOUT,
            PRECISION,
            TALL,
        )
