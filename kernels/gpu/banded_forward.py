"""Forward as a product with a banded matrix.

The targets m of a tile of cells share a halo of source pixels p. Their weights form a matrix A [p, m] that is zero outside each window, so
that y = A^T x is a product for the tensor cores. A is built once from the logits and serves all channels of a group.

M, P, T: targets, halo, taps of a window, rounded up to a power of two; T leaves room for one tap of zero, which stands for everything
outside a window. Feature tiles have locations first where channels are the fastest axis of the features (AXIS 0), else last.
"""

import triton
import triton.language as tl

from .launch import SPECIALIZATION
from .window import aligned, centre, expand, product, score, weight


@triton.jit(**SPECIALIZATION)
def banded_forward(
    x_ptr,  # [N, G * C, H, W]
    logits_ptr,  # [N, G * K * K, UP, UP, HQ, WQ]
    y_ptr,  # [N, G * C, HO, WO]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    G,
    C,
    H,
    W,
    HO,
    WO,
    HQ,
    WQ,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_ln,
    stride_lc,
    stride_lu,
    stride_lv,
    stride_lh,
    stride_lw,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    K: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    NORMALIZER: tl.constexpr,
    AXIS: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    X_ALIGN: tl.constexpr,
    Y_ALIGN: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    if AXIS == 0:
        stride_xw, stride_yw = aligned(stride_xw, X_ALIGN), aligned(stride_yw, Y_ALIGN)
        C = aligned(C, X_ALIGN)
    else:
        stride_xc, stride_yc = aligned(stride_xc, X_ALIGN), aligned(stride_yc, Y_ALIGN)
        W = aligned(W, X_ALIGN)
        WO = aligned(WO, Y_ALIGN)
    stride_xn, stride_xh = aligned(stride_xn, X_ALIGN), aligned(stride_xh, X_ALIGN)
    stride_yn, stride_yh = aligned(stride_yn, Y_ALIGN), aligned(stride_yh, Y_ALIGN)
    ROWS: tl.constexpr = CELLS_H * UP
    COLS: tl.constexpr = CELLS_W * UP
    HALO_H: tl.constexpr = ((ROWS - 1) * DOWN) // UP + K
    # in rows of pixels a halo begins and ends where a vector does, LEAD columns before the sources of the tile
    VECTOR: tl.constexpr = X_ALIGN if AXIS == 1 else 1
    LEAD: tl.constexpr = (K // 2 + VECTOR - 1) // VECTOR * VECTOR
    HALO_W: tl.constexpr = (LEAD + ((COLS - 1) * DOWN) // UP + K // 2 + VECTOR) // VECTOR * VECTOR
    M: tl.constexpr = triton.next_power_of_2((ROWS * COLS - 1) | 15)
    P: tl.constexpr = triton.next_power_of_2((HALO_H * HALO_W - 1) | 15)
    T: tl.constexpr = triton.next_power_of_2(K * K | 15)
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_w = tl.cdiv(WQ, CELLS_W)
    tiles_h = tl.cdiv(HQ, CELLS_H)
    pid = tl.program_id(0)
    q0 = pid // tiles_w % tiles_h * CELLS_H
    r0 = pid % tiles_w * CELLS_W
    pid = pid // (tiles_w * tiles_h)
    part = pid % SPLIT
    ng = (pid // SPLIT).to(tl.int64)
    n, g = ng // G, ng % G

    m = tl.arange(0, M).to(INDEX)
    row, col = q0 * UP + m // COLS, r0 * UP + m % COLS
    exists = (m < ROWS * COLS) & (row < HQ * UP) & (col < WQ * UP)
    u, v, q, r = row % UP, col % UP, row // UP, col // UP
    t = tl.arange(0, T).to(INDEX)
    taps = (t < K * K)[:, None]
    l_ptr = logits_ptr + n * stride_ln + g * (K * K) * stride_lc
    logits = tl.load(
        l_ptr + (u * stride_lu + v * stride_lv + q * stride_lh + r * stride_lw)[None, :] + (t * stride_lc)[:, None],
        mask=taps & exists[None, :],
        other=-float("inf"),
    ).to(tl.float32)
    if NORMALIZER == "softmax" or NORMALIZER == "sigmoid_normalized":
        s = score(logits, NORMALIZER)
        top = tl.where(exists, tl.max(s, axis=0), 0.0)
        w = tl.exp(s - top[None, :])
        total = tl.where(exists, tl.sum(w, axis=0), 1.0)
        w *= (1.0 / total)[None, :]
        if part == 0:
            tl.store(lse_ptr + (((ng * UP + u) * UP + v) * HQ + q) * WQ + r, top + tl.log(total), mask=exists)
    else:
        w = tl.where(taps, weight(logits, 0.0, NORMALIZER), 0.0)

    p = tl.arange(0, P).to(INDEX)
    pi, pj = p // HALO_W, p % HALO_W - (LEAD - K // 2)
    ci, cj = centre(m // COLS, UP, DOWN), centre(m % COLS, UP, DOWN)
    ky = pi[:, None] - ci[None, :]
    kx = pj[:, None] - cj[None, :]
    band = (ky.to(tl.uint32) < K) & (kx.to(tl.uint32) < K)
    tap = tl.where(band, (pi * K + pj)[:, None] - (ci * K + cj)[None, :], T - 1)
    a = tl.gather(w.to(x_ptr.dtype.element_ty), tap.to(tl.int32), axis=0)

    i, j = q0 * DOWN - K // 2 + pi, r0 * DOWN - K // 2 + pj
    inside = (p < HALO_H * HALO_W) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    x_ptr += n * stride_xn + g * C * stride_xc
    y_ptr += n * stride_yn + g * C * stride_yc
    output = (m < ROWS * COLS) & (row < HO) & (col < WO)
    for start in range(part * BLOCK_C, C, SPLIT * BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(INDEX)
        x = tl.load(
            x_ptr + expand(i * stride_xh + j * stride_xw, AXIS) + expand(c * stride_xc, 1 - AXIS),
            mask=expand(inside, AXIS) & expand(c < C, 1 - AXIS),
            other=0.0,
        )
        if AXIS == 1:
            y = product(x, a, PRECISION)
        elif TALL:
            y = tl.trans(product(tl.trans(x), a, PRECISION))
        else:
            y = product(tl.trans(a), x, PRECISION)
        tl.store(
            y_ptr + expand(row * stride_yh + col * stride_yw, AXIS) + expand(c * stride_yc, 1 - AXIS),
            y.to(y_ptr.dtype.element_ty),
            mask=expand(output, AXIS) & expand(c < C, 1 - AXIS),
        )
