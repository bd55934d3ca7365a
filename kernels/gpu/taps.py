"""The operator tap by tap: any window, any scale, any strides. The banded kernels are faster where they apply.

N batch, C channels of one group, G groups, K kernel size, H, W source size, HO, WO output size, HQ, WQ cells. A rational scale may cut the
last cell: its targets beyond HO, WO have a log-sum-exp and a zero gradient, but no output.

    y[m] = sum_t w[m, t] x[window(m) + t]
    dw[m, t] = sum_c dy[m, c] x[window(m) + t, c]
    dx[s] = sum_t sum_{m: window(m) + t = s} w[m, t] dy[m]

A program holds BLOCK_M locations of one group of one image. Its tiles are [BLOCK_M, BLOCK_C] where channels are the fastest axis of the
features, else [BLOCK_C, BLOCK_M]: AXIS is the place of locations in a tile.
"""

import triton
import triton.language as tl

from .launch import SPECIALIZATION
from .window import centre, logit_gradient, score, weight


@triton.jit
def _locations(rows, cols, BLOCK_M: tl.constexpr):
    """Image and group, row, column of every location of this program, and whether it exists."""
    blocks = tl.cdiv(rows * cols, BLOCK_M)
    m = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return (tl.program_id(0) // blocks).to(tl.int64), m // cols, m % cols, m < rows * cols


@triton.jit
def _tap(row, col, tap, mask, H, W, K: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr):
    """Source row and column of a tap of every target's window, and whether it lies inside the map."""
    i = centre(row, UP, DOWN) + tap // K - K // 2
    j = centre(col, UP, DOWN) + tap % K - K // 2
    return i, j, mask & (i >= 0) & (i < H) & (j >= 0) & (j < W)


@triton.jit(**SPECIALIZATION)
def tap_forward(
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
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ng, row, col, mask = _locations(HQ * UP, WQ * UP, BLOCK_M)
    n, g = ng // G, ng % G
    l_ptr = logits_ptr + n * stride_ln + g * (K * K) * stride_lc
    l_ptr += (row % UP) * stride_lu + (col % UP) * stride_lv + row // UP * stride_lh + col // UP * stride_lw
    lse = tl.zeros([BLOCK_M], tl.float32)
    if NORMALIZER == "softmax" or NORMALIZER == "sigmoid_normalized":
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        for tap in range(K * K):
            top = tl.maximum(top, score(tl.load(l_ptr + tap * stride_lc, mask=mask, other=0.0).to(tl.float32), NORMALIZER))
        for tap in range(K * K):
            lse += tl.exp(score(tl.load(l_ptr + tap * stride_lc, mask=mask, other=0.0).to(tl.float32), NORMALIZER) - top)
        lse = top + tl.log(lse)
        tl.store(lse_ptr + (((ng * UP + row % UP) * UP + col % UP) * HQ + row // UP) * WQ + col // UP, lse, mask=mask)
    mask = mask & (row < HO) & (col < WO)
    x_ptr += n * stride_xn + g * C * stride_xc
    y_ptr += n * stride_yn + g * C * stride_yc + tl.expand_dims(row * stride_yh + col * stride_yw, 1 - AXIS)
    for start in range(0, C, BLOCK_C):
        c = tl.expand_dims(start + tl.arange(0, BLOCK_C), AXIS).to(tl.int64)
        y = tl.zeros([BLOCK_M, BLOCK_C] if AXIS == 0 else [BLOCK_C, BLOCK_M], tl.float32)
        for tap in range(K * K):
            i, j, inside = _tap(row, col, tap, mask, H, W, K, UP, DOWN)
            w = weight(tl.load(l_ptr + tap * stride_lc, mask=inside, other=0.0).to(tl.float32), lse, NORMALIZER)
            x = tl.load(
                x_ptr + tl.expand_dims(i * stride_xh + j * stride_xw, 1 - AXIS) + c * stride_xc,
                mask=tl.expand_dims(inside, 1 - AXIS) & (c < C),
                other=0.0,
            )
            y += tl.expand_dims(w, 1 - AXIS) * x.to(tl.float32)
        tl.store(y_ptr + c * stride_yc, y.to(y_ptr.dtype.element_ty), mask=tl.expand_dims(mask, 1 - AXIS) & (c < C))


@triton.jit(**SPECIALIZATION)
def tap_logit_gradient(
    x_ptr,  # [N, G * C, H, W]
    logits_ptr,  # [N, G * K * K, UP, UP, HQ, WQ]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    dy_ptr,  # [N, G * C, HO, WO]
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
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    NORMALIZED: tl.constexpr = NORMALIZER == "softmax" or NORMALIZER == "sigmoid_normalized"
    ng, row, col, mask = _locations(HQ * UP, WQ * UP, BLOCK_M)
    n, g = ng // G, ng % G
    u, v, q, r = row % UP, col % UP, row // UP, col // UP
    l_ptr = logits_ptr + n * stride_ln + g * (K * K) * stride_lc + u * stride_lu + v * stride_lv + q * stride_lh + r * stride_lw
    dl_ptr = dlogits_ptr + n * stride_dln + g * (K * K) * stride_dlc
    dl_ptr += u * stride_dlu + v * stride_dlv + q * stride_dlh + r * stride_dlw
    lse = tl.zeros([BLOCK_M], tl.float32)
    if NORMALIZED:
        lse = tl.load(lse_ptr + (((ng * UP + u) * UP + v) * HQ + q) * WQ + r, mask=mask, other=0.0)
    output = mask & (row < HO) & (col < WO)
    x_ptr += n * stride_xn + g * C * stride_xc
    dy_ptr += n * stride_dyn + g * C * stride_dyc + tl.expand_dims(row * stride_dyh + col * stride_dyw, 1 - AXIS)
    mean = tl.zeros([BLOCK_M], tl.float32)
    # the sum over a window comes before any of its gradients: a normaliser takes two passes
    for step in range(2 * K * K if NORMALIZED else K * K):
        tap = step % (K * K)
        i, j, inside = _tap(row, col, tap, output, H, W, K, UP, DOWN)
        s_ptr = x_ptr + tl.expand_dims(i * stride_xh + j * stride_xw, 1 - AXIS)
        dw = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = tl.expand_dims(start + tl.arange(0, BLOCK_C), AXIS).to(tl.int64)
            both = tl.expand_dims(inside, 1 - AXIS) & (c < C)
            x = tl.load(s_ptr + c * stride_xc, mask=both, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + c * stride_dyc, mask=both, other=0.0).to(tl.float32)
            dw += tl.sum(x * dy, axis=1 - AXIS)
        logit = tl.load(l_ptr + tap * stride_lc, mask=mask, other=0.0).to(tl.float32)
        w = weight(logit, lse, NORMALIZER)
        if NORMALIZED and step < K * K:
            mean += w * dw
        else:
            dl = logit_gradient(logit, w, dw, mean, NORMALIZER)
            tl.store(dl_ptr + tap * stride_dlc, tl.where(output, dl, 0.0).to(dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit(**SPECIALIZATION)
def tap_source_gradient(
    logits_ptr,  # [N, G * K * K, UP, UP, HQ, WQ]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    dy_ptr,  # [N, G * C, HO, WO]
    dx_ptr,  # [N, G * C, H, W]
    G,
    C,
    H,
    W,
    HO,
    WO,
    HQ,
    WQ,
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
    K: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    NORMALIZER: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # at most this many target rows (columns) are centred on one source row (column)
    SHARING: tl.constexpr = (UP + DOWN - 1) // DOWN
    ng, i, j, mask = _locations(H, W, BLOCK_M)
    n, g = ng // G, ng % G
    logits_ptr += n * stride_ln + g * (K * K) * stride_lc
    dy_ptr += n * stride_dyn + g * C * stride_dyc
    # expanded before they are used: where it is done afterwards, Triton 3.6 gives masks another layout than their pointers
    i, j, mask = tl.expand_dims(i, 1 - AXIS), tl.expand_dims(j, 1 - AXIS), tl.expand_dims(mask, 1 - AXIS)
    dx_ptr += n * stride_dxn + g * C * stride_dxc + i * stride_dxh + j * stride_dxw
    for start in range(0, C, BLOCK_C):
        c = tl.expand_dims(start + tl.arange(0, BLOCK_C), AXIS).to(tl.int64)
        dx = tl.zeros([BLOCK_M, BLOCK_C] if AXIS == 0 else [BLOCK_C, BLOCK_M], tl.float32)
        for step in range(K * K * SHARING * SHARING):
            tap = step % (K * K)
            # the targets centred on row m are the first at or after m * UP / DOWN and those that follow
            mi = i + K // 2 - tap // K
            mj = j + K // 2 - tap % K
            row = (tl.maximum(mi, 0) * UP + DOWN - 1) // DOWN + step // (K * K * SHARING)
            col = (tl.maximum(mj, 0) * UP + DOWN - 1) // DOWN + step // (K * K) % SHARING
            inside = mask & (row < HO) & (col < WO) & (row * DOWN < (mi + 1) * UP) & (col * DOWN < (mj + 1) * UP)
            u, v, q, r = row % UP, col % UP, row // UP, col // UP
            l_ptr = logits_ptr + tap * stride_lc + u * stride_lu + v * stride_lv + q * stride_lh + r * stride_lw
            lse = tl.zeros(i.shape, tl.float32)
            if NORMALIZER == "softmax" or NORMALIZER == "sigmoid_normalized":
                lse = tl.load(lse_ptr + (((ng * UP + u) * UP + v) * HQ + q) * WQ + r, mask=inside, other=0.0)
            w = weight(tl.load(l_ptr, mask=inside, other=0.0).to(tl.float32), lse, NORMALIZER)
            dy = tl.load(
                dy_ptr + row * stride_dyh + col * stride_dyw + c * stride_dyc,
                mask=inside & (c < C),
                other=0.0,
            )
            dx += w * dy.to(tl.float32)
        tl.store(dx_ptr + c * stride_dxc, dx.to(dx_ptr.dtype.element_ty), mask=mask & (c < C))
