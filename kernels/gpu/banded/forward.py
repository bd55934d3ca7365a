"""Forward as a product with a banded matrix.

The targets m of a tile of cells share a halo of source pixels p. Their weights form a matrix A [p, m] that is zero outside each window, so
that y = A^T x is a product for the tensor cores. A is built once from the logits and serves all channels of a group.

The axes m, p and t are targets, sources of the halo and taps of a window, rounded up to a power of two. At least one tap remains: it has
weight zero and represents everything outside a window.
"""

import triton
import triton.language as tl

from ..common.blocks import align_sizes, align_strides, find_tile, image, is_inside, load, place_sources, product, split_group, store
from ..common.records import Features, Logits, Sizes
from ..common.window import centre, normalize_tile, place_targets


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
    mi, mj, _, _, _, _ = place_targets(m, HALO, WINDOW, LAYOUT)
    row, col = q0 * UP + mi, r0 * UP + mj
    w = normalize_tile(sizes, logits, lse_ptr, ng, n, g, q0, r0, part == 0, WINDOW, HALO, LAYOUT)

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
