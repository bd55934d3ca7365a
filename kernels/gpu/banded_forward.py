"""Forward as a product with a banded matrix.

The targets m of a tile of cells share a halo of source pixels p. Their weights form a matrix A [p, m] that is zero outside each window, so
that y = A^T x is a product for the tensor cores. A is built once from the logits and serves all channels of a group.

The axes m, p and t are targets, sources of the halo and taps of a window, rounded up to a power of two. At least one tap remains: it has
weight zero and represents everything outside a window.
"""

import triton
import triton.language as tl

from .blocks import align_sizes, align_strides, find_tile, image, is_inside, load, place_sources, product, split_group, store
from .records import Features, Logits, Sizes
from .special import exp, log, reciprocal
from .window import (
    align_logits,
    centre,
    group_logits,
    is_left_out,
    logit_addresses,
    logit_offset,
    lse_address,
    place_targets,
    score,
    weight,
)


@triton.jit
def banded_forward(
    sizes: Sizes,
    x: Features,  # [N, G * C, H, W]
    logits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    y: Features,  # [N, G * C, HO, WO]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    HALO: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TALL: tl.constexpr,  # whether channels are the rows of the product
):
    """Fill y and, where weights are normalized, the log-sum-exp of every window; one program computes a part of the channels of a tile."""
    K: tl.constexpr = WINDOW.kernel_size
    UP: tl.constexpr = WINDOW.up
    sizes = align_sizes(sizes, LAYOUT)
    x = align_strides(x, LAYOUT.x_axis, LAYOUT.x_align)
    y = align_strides(y, LAYOUT.y_axis, LAYOUT.y_align)
    tiles_w = tl.cdiv(sizes.wq, TILE.cells_w)
    tiles_h = tl.cdiv(sizes.hq, TILE.cells_h)
    pid = tl.program_id(0)
    q0, r0, pid = find_tile(pid, tiles_h, tiles_w)
    q0 *= TILE.cells_h
    r0 *= TILE.cells_w
    part = pid % TILE.split
    ng = pid // TILE.split
    n, g = split_group(ng, sizes)

    m = tl.arange(0, HALO.m).to(LAYOUT.index)
    mi, mj, u, v, q, r = place_targets(m, HALO, WINDOW, LAYOUT)
    row, col, q, r = q0 * UP + mi, r0 * UP + mj, q0 + q, r0 + r
    exists = (m < HALO.rows * HALO.cols) & (q < sizes.hq) & (r < sizes.wq)
    t = tl.arange(0, HALO.t).to(LAYOUT.index)
    taps = (t < K * K)[:, None]
    logits = group_logits(align_logits(logits, WINDOW, LAYOUT), n, g, WINDOW)
    l = tl.load(
        logit_addresses(logits, t[:, None], logit_offset(logits, u, v, q, r)[None, :], WINDOW, LAYOUT),
        mask=taps & exists[None, :],
        other=-float("inf"),
    ).to(tl.float32)
    if WINDOW.border == "renormalize":
        l = tl.where(is_left_out(row[None, :], col[None, :], t[:, None], sizes, WINDOW), -float("inf"), l)
    if WINDOW.normalized:
        s = score(l, WINDOW)
        top = tl.where(exists, tl.max(s, axis=0), 0.0)
        w = exp(s - top[None, :])
        total = tl.where(exists, tl.sum(w, axis=0), 1.0)
        w *= reciprocal(total)[None, :]
        if part == 0:
            tl.store(lse_address(lse_ptr, sizes, ng.to(tl.int64), u, v, q, r, WINDOW), top + log(total), mask=exists)
    else:
        w = tl.where(taps, weight(l, 0.0, WINDOW), 0.0)

    p = tl.arange(0, HALO.p).to(LAYOUT.index)
    pi, pj = place_sources(p, HALO, LAYOUT)
    pj -= HALO.lead - K // 2
    ci, cj = centre(mi, WINDOW), centre(mj, WINDOW)
    ky = pi[:, None] - ci[None, :]
    kx = pj[:, None] - cj[None, :]
    band = (ky.to(tl.uint32) < K) & (kx.to(tl.uint32) < K)
    tap = tl.where(band, (pi * K + pj)[:, None] - (ci * K + cj)[None, :], HALO.t - 1)
    a = tl.gather(w.to(x.ptr.dtype.element_ty), tap.to(tl.int32), axis=0)

    i, j = q0 * WINDOW.down - K // 2 + pi, r0 * WINDOW.down - K // 2 + pj
    inside = (p < HALO.height * HALO.width) & is_inside(i, j, sizes)
    x = image(x, n, g * sizes.c)
    y = image(y, n, g * sizes.c)
    output = (m < HALO.rows * HALO.cols) & (row < sizes.ho) & (col < sizes.wo)
    for start in range(part * TILE.block_c, sizes.c, TILE.split * TILE.block_c):
        c = start + tl.arange(0, TILE.block_c).to(LAYOUT.index)
        source = load(x, i, j, inside, c, sizes.c, LAYOUT.x_axis, HALO.width)
        if LAYOUT.x_axis == 1:
            target = product(source, a, PRECISION)
        elif LAYOUT.y_axis == 1:
            target = product(tl.trans(source), a, PRECISION)
        elif TALL:
            target = tl.trans(product(tl.trans(source), a, PRECISION))
        else:
            target = product(tl.trans(a), source, PRECISION)
        store(y, row, col, output, c, sizes.c, target, LAYOUT.y_axis, HALO.cols)
