"""Backward as two products with banded matrices, in one launch.

Two programs share a tile of cells. One has its targets m and the halo p of source pixels, and computes the gradient to the logits:

    dw = x dy^T [p, m], summed over channels; every window takes its band of it; then the gradient of the normaliser

The other has its sources s and the targets d whose windows reach into the tile, and computes the gradient to the features:

    dx = B^T dy [s, c],  B[d, s] = weight with which target d read source s, rebuilt from its logit and the log-sum-exp of its window

They run side by side, so dy comes from memory once for both. Feature tiles have locations first where channels are the fastest axis of the
features (AXIS 0), else last. M, P, S, T: targets, halo, sources, taps of a tile, rounded up to a power of two.
"""

import triton
import triton.language as tl

from .launch import SPECIALIZATION
from .window import aligned, centre, expand, logit_gradient, product, weight


@triton.jit
def _logit_gradient(
    x_ptr,
    logits_ptr,
    lse_ptr,
    dy_ptr,
    dlogits_ptr,
    q0,
    r0,
    C,
    H,
    W,
    HO,
    WO,
    HQ,
    WQ,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_lc,
    stride_lu,
    stride_lv,
    stride_lh,
    stride_lw,
    stride_dyc,
    stride_dyh,
    stride_dyw,
    stride_dlc,
    stride_dlu,
    stride_dlv,
    stride_dlh,
    stride_dlw,
    K: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    NORMALIZER: tl.constexpr,
    AXIS: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    NORMALIZED: tl.constexpr = NORMALIZER == "softmax" or NORMALIZER == "sigmoid_normalized"
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    ROWS: tl.constexpr = CELLS_H * UP
    COLS: tl.constexpr = CELLS_W * UP
    HALO_H: tl.constexpr = ((ROWS - 1) * DOWN) // UP + K
    # in rows of pixels a halo begins and ends where a vector does, LEAD columns before the sources of the tile
    VECTOR: tl.constexpr = ALIGN if AXIS == 1 else 1
    LEAD: tl.constexpr = (K // 2 + VECTOR - 1) // VECTOR * VECTOR
    HALO_W: tl.constexpr = (LEAD + ((COLS - 1) * DOWN) // UP + K // 2 + VECTOR) // VECTOR * VECTOR
    M: tl.constexpr = triton.next_power_of_2((ROWS * COLS - 1) | 15)
    P: tl.constexpr = triton.next_power_of_2((HALO_H * HALO_W - 1) | 15)
    T: tl.constexpr = triton.next_power_of_2(K * K | 15)
    m = tl.arange(0, M).to(INDEX)
    row, col = q0 * UP + m // COLS, r0 * UP + m % COLS
    output = (m < ROWS * COLS) & (row < HO) & (col < WO)
    p = tl.arange(0, P).to(INDEX)
    i, j = q0 * DOWN - K // 2 + p // HALO_W, r0 * DOWN - LEAD + p % HALO_W
    inside = (p < HALO_H * HALO_W) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    dw = tl.zeros([P, M], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(INDEX)
        x = tl.load(
            x_ptr + expand(i * stride_xh + j * stride_xw, AXIS) + expand(c * stride_xc, 1 - AXIS),
            mask=expand(inside, AXIS) & expand(c < C, 1 - AXIS),
            other=0.0,
        )
        dy = tl.load(
            dy_ptr + expand(row * stride_dyh + col * stride_dyw, AXIS) + expand(c * stride_dyc, 1 - AXIS),
            mask=expand(output, AXIS) & expand(c < C, 1 - AXIS),
            other=0.0,
        )
        if AXIS == 0:
            dw += product(x, tl.trans(dy), PRECISION)
        else:
            dw += product(tl.trans(x), dy, PRECISION)
    t = tl.arange(0, T).to(INDEX)
    corner = centre(m // COLS, UP, DOWN) * HALO_W + centre(m % COLS, UP, DOWN) + LEAD - K // 2
    band = tl.minimum(corner[None, :] + (t // K * HALO_W + t % K)[:, None], P - 1)
    dw = tl.gather(dw, band.to(tl.int32), axis=0)
    exists = (m < ROWS * COLS) & (row < HQ * UP) & (col < WQ * UP)
    taps = (t < K * K)[:, None] & exists[None, :]
    u, v, q, r = row % UP, col % UP, row // UP, col // UP
    l = tl.load(
        logits_ptr + (u * stride_lu + v * stride_lv + q * stride_lh + r * stride_lw)[None, :] + (t * stride_lc)[:, None],
        mask=taps,
        other=-float("inf") if NORMALIZED else 0.0,
    ).to(tl.float32)
    lse = tl.zeros([M], tl.float32)
    if NORMALIZED:
        lse = tl.load(lse_ptr + ((u * UP + v) * HQ + q) * WQ + r, mask=exists, other=0.0)
    w = weight(l, lse[None, :], NORMALIZER)
    # a target that a rational scale cuts off has read no gradient
    dl = logit_gradient(l, w, dw, tl.sum(w * dw, axis=0)[None, :], NORMALIZER)
    tl.store(
        dlogits_ptr + (u * stride_dlu + v * stride_dlv + q * stride_dlh + r * stride_dlw)[None, :] + (t * stride_dlc)[:, None],
        dl.to(dlogits_ptr.dtype.element_ty),
        mask=taps,
    )


@triton.jit
def _source_gradient(
    logits_ptr,
    lse_ptr,
    dy_ptr,
    dx_ptr,
    q0,
    r0,
    first,
    C,
    H,
    W,
    HO,
    WO,
    HQ,
    WQ,
    stride_lc,
    stride_lu,
    stride_lv,
    stride_lh,
    stride_lw,
    stride_dyc,
    stride_dyh,
    stride_dyw,
    stride_dxc,
    stride_dxh,
    stride_dxw,
    K: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    NORMALIZER: tl.constexpr,
    AXIS: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    NORMALIZED: tl.constexpr = NORMALIZER == "softmax" or NORMALIZER == "sigmoid_normalized"
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    R: tl.constexpr = K // 2
    SH: tl.constexpr = CELLS_H * DOWN
    SW: tl.constexpr = CELLS_W * DOWN
    S: tl.constexpr = triton.next_power_of_2((SH * SW - 1) | 15)
    s = tl.arange(0, S).to(INDEX)
    i, j = q0 * DOWN + s // SW, r0 * DOWN + s % SW
    owned = (s < SH * SW) & (i < H) & (j < W)
    # the first target to reach into the tile lies REACH before its own
    REACH: tl.constexpr = R * UP // DOWN
    DH: tl.constexpr = ((SH + R) * UP + DOWN - 1) // DOWN + REACH
    VECTOR: tl.constexpr = ALIGN if AXIS == 1 else 1
    LEAD: tl.constexpr = (REACH + VECTOR - 1) // VECTOR * VECTOR
    DW: tl.constexpr = (LEAD + ((SW + R) * UP + DOWN - 1) // DOWN + VECTOR - 1) // VECTOR * VECTOR
    for start in range(first * BLOCK_C, C, SPLIT * BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(INDEX)
        dx = tl.zeros([S, BLOCK_C] if AXIS == 0 else [BLOCK_C, S], tl.float32)
        for d0 in range(0, DH * DW, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D).to(INDEX)
            row, col = q0 * UP - REACH + d // DW, r0 * UP - LEAD + d % DW
            reaching = (d < DH * DW) & (row >= 0) & (row < HO) & (col >= 0) & (col < WO)
            dy = tl.load(
                dy_ptr + expand(row * stride_dyh + col * stride_dyw, AXIS) + expand(c * stride_dyc, 1 - AXIS),
                mask=expand(reaching, AXIS) & expand(c < C, 1 - AXIS),
                other=0.0,
            )
            row, col = tl.maximum(row, 0), tl.maximum(col, 0)
            u, v, q, r = row % UP, col % UP, row // UP, col // UP
            ky = expand(i + R, 1 - AXIS) - expand(centre(row, UP, DOWN), AXIS)
            kx = expand(j + R, 1 - AXIS) - expand(centre(col, UP, DOWN), AXIS)
            band = (ky.to(tl.uint32) < K) & (kx.to(tl.uint32) < K) & expand(reaching, AXIS)
            l = tl.load(
                logits_ptr + expand(u * stride_lu + v * stride_lv + q * stride_lh + r * stride_lw, AXIS) + (ky * K + kx) * stride_lc,
                mask=band,
                other=-float("inf") if NORMALIZED else 0.0,
            ).to(tl.float32)
            lse = tl.zeros([BLOCK_D], tl.float32)
            if NORMALIZED:
                lse = tl.load(lse_ptr + ((u * UP + v) * HQ + q) * WQ + r, mask=reaching, other=0.0)
            b = weight(l, expand(lse, AXIS), NORMALIZER)
            if NORMALIZER == "sigmoid":
                b = tl.where(band, b, 0.0)
            b = b.to(dy_ptr.dtype.element_ty)
            if AXIS == 0:
                dx += product(tl.trans(b), dy, PRECISION)
            else:
                dx += product(dy, tl.trans(b), PRECISION)
        tl.store(
            dx_ptr + expand(i * stride_dxh + j * stride_dxw, AXIS) + expand(c * stride_dxc, 1 - AXIS),
            dx.to(dx_ptr.dtype.element_ty),
            mask=expand(owned, AXIS) & expand(c < C, 1 - AXIS),
        )


@triton.jit(**SPECIALIZATION)
def banded_backward(
    x_ptr,  # [N, G * C, H, W]
    logits_ptr,  # [N, G * K * K, UP, UP, HQ, WQ]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    dy_ptr,  # [N, G * C, HO, WO]
    dx_ptr,  # [N, G * C, H, W]
    dlogits_ptr,  # [N, G * K * K, UP, UP, HQ, WQ]
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
    stride_dyn,
    stride_dyc,
    stride_dyh,
    stride_dyw,
    stride_dxn,
    stride_dxc,
    stride_dxh,
    stride_dxw,
    stride_dln,
    stride_dlc,
    stride_dlu,
    stride_dlv,
    stride_dlh,
    stride_dlw,
    K: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    NORMALIZER: tl.constexpr,
    AXIS: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DLOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    X_ALIGN: tl.constexpr,
    DY_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    if AXIS == 0:
        stride_xw, stride_dxw, stride_dyw = aligned(stride_xw, X_ALIGN), aligned(stride_dxw, X_ALIGN), aligned(stride_dyw, DY_ALIGN)
        C = aligned(C, X_ALIGN)
    else:
        stride_xc, stride_dxc, stride_dyc = aligned(stride_xc, X_ALIGN), aligned(stride_dxc, X_ALIGN), aligned(stride_dyc, DY_ALIGN)
        W = aligned(W, X_ALIGN)
        WO = aligned(WO, DY_ALIGN)
    stride_xn, stride_xh = aligned(stride_xn, X_ALIGN), aligned(stride_xh, X_ALIGN)
    stride_dxn, stride_dxh = aligned(stride_dxn, X_ALIGN), aligned(stride_dxh, X_ALIGN)
    stride_dyn, stride_dyh = aligned(stride_dyn, DY_ALIGN), aligned(stride_dyh, DY_ALIGN)

    ROLES: tl.constexpr = NEED_DLOGITS + NEED_DX * SPLIT
    tiles_w = tl.cdiv(WQ, CELLS_W)
    tiles_h = tl.cdiv(HQ, CELLS_H)
    pid = tl.program_id(0)
    role = pid % ROLES
    pid = pid // ROLES
    q0 = (pid // tiles_w) % tiles_h * CELLS_H
    r0 = pid % tiles_w * CELLS_W
    ng = (pid // (tiles_w * tiles_h)).to(tl.int64)
    n, g = ng // G, ng % G
    x_ptr += n * stride_xn + g * C * stride_xc
    dy_ptr += n * stride_dyn + g * C * stride_dyc
    logits_ptr += n * stride_ln + g * (K * K) * stride_lc
    lse_ptr += ng * UP * UP * HQ * WQ
    if NEED_DLOGITS and role == ROLES - 1:
        _logit_gradient(
            x_ptr,
            logits_ptr,
            lse_ptr,
            dy_ptr,
            dlogits_ptr + n * stride_dln + g * (K * K) * stride_dlc,
            q0,
            r0,
            C,
            H,
            W,
            HO,
            WO,
            HQ,
            WQ,
            stride_xc,
            stride_xh,
            stride_xw,
            stride_lc,
            stride_lu,
            stride_lv,
            stride_lh,
            stride_lw,
            stride_dyc,
            stride_dyh,
            stride_dyw,
            stride_dlc,
            stride_dlu,
            stride_dlv,
            stride_dlh,
            stride_dlw,
            K,
            UP,
            DOWN,
            NORMALIZER,
            AXIS,
            CELLS_H,
            CELLS_W,
            BLOCK_L,
            PRECISION,
            X_ALIGN,
            WIDE,
        )
    elif NEED_DX:
        _source_gradient(
            logits_ptr,
            lse_ptr,
            dy_ptr,
            dx_ptr + n * stride_dxn + g * C * stride_dxc,
            q0,
            r0,
            role,
            C,
            H,
            W,
            HO,
            WO,
            HQ,
            WQ,
            stride_lc,
            stride_lu,
            stride_lv,
            stride_lh,
            stride_lw,
            stride_dyc,
            stride_dyh,
            stride_dyw,
            stride_dxc,
            stride_dxh,
            stride_dxw,
            K,
            UP,
            DOWN,
            NORMALIZER,
            AXIS,
            CELLS_H,
            CELLS_W,
            BLOCK_X,
            BLOCK_D,
            SPLIT,
            PRECISION,
            DY_ALIGN,
            WIDE,
        )
