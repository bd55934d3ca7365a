"""The place of windows, and the step from logits to weights, which all Triton kernels of the operator share.

The weight of tap t is exp(score_t - lse), where a score is the logit (softmax) or its log-sigmoid (normalised sigmoid) and lse is the
log-sum-exp of the scores of a window. One number per window restores all of its weights. The other normalizers need no sum.
"""

import triton
import triton.language as tl

from .blocks import aligned, along_rows
from .records import Logits, Sizes
from .special import exp, log, reciprocal


@triton.jit
def score(logit, WINDOW: tl.constexpr):
    """Return the unnormalised log-weight of a tap."""
    if WINDOW.normalizer == "sigmoid_normalized":
        return tl.minimum(logit, 0.0) - log(1.0 + exp(-tl.abs(logit)))
    else:
        return logit


@triton.jit
def weight(logit, lse, WINDOW: tl.constexpr):
    """Return the weight of a tap, given the log-sum-exp of its window."""
    if WINDOW.normalizer == "none":
        return logit
    elif WINDOW.normalizer == "sigmoid":
        return reciprocal(1.0 + exp(-logit))
    else:
        return exp(score(logit, WINDOW) - lse)


@triton.jit
def logit_gradient(logit, weight, gradient, mean, WINDOW: tl.constexpr):
    """Return the gradient to a logit from the gradient to its weight; mean is the sum of weight * gradient over the window."""
    if WINDOW.normalizer == "none":
        return gradient
    elif WINDOW.normalizer == "sigmoid":
        return weight * (1.0 - weight) * gradient
    elif WINDOW.normalizer == "softmax":
        return weight * (gradient - mean)
    else:
        return weight * (gradient - mean) * reciprocal(1.0 + exp(logit))


@triton.jit
def centre(output, WINDOW: tl.constexpr):
    """Return the source row (column) on which the window of an output row (column) is centred."""
    return (output * WINDOW.down) // WINDOW.up


@triton.jit
def is_left_out(row, col, tap, sizes: Sizes, WINDOW: tl.constexpr):
    """Return whether a tap lies outside the map and is left out of its window; windows that a rational scale cuts off have all taps."""
    K: tl.constexpr = WINDOW.kernel_size
    i, j = centre(row, WINDOW), centre(col, WINDOW)
    si, sj = i + tap // K - K // 2, j + tap % K - K // 2
    return ((i < sizes.h) & ((si < 0) | (si >= sizes.h))) | ((j < sizes.w) & ((sj < 0) | (sj >= sizes.w)))


@triton.jit
def align_logits(logits: Logits, WINDOW: tl.constexpr, LAYOUT: tl.constexpr):
    """Tell the compiler that the logits of a cell are a run, and at what multiples runs begin, if the host has found this."""
    if LAYOUT.cell_align > 0:
        UP: tl.constexpr = WINDOW.up
        ALIGN: tl.constexpr = LAYOUT.cell_align
        n, h, w = aligned(logits.stride_n, ALIGN), aligned(logits.stride_h, ALIGN), aligned(logits.stride_w, ALIGN)
        return Logits(logits.ptr, n, UP * UP, UP, 1, h, w)
    else:
        return logits


@triton.jit
def group_logits(logits: Logits, n, g, WINDOW: tl.constexpr):
    """Return the logits of group g of image n."""
    ptr = logits.ptr + n * logits.stride_n + g * (WINDOW.kernel_size * WINDOW.kernel_size) * logits.stride_c
    return Logits(ptr, logits.stride_n, logits.stride_c, logits.stride_u, logits.stride_v, logits.stride_h, logits.stride_w)


@triton.jit
def widen_taps(logits: Logits, LAYOUT: tl.constexpr):
    """Return logits whose stride of taps has the type of offsets, for taps that have another type."""
    stride_c = tl.cast(logits.stride_c, LAYOUT.index)
    return Logits(logits.ptr, logits.stride_n, stride_c, logits.stride_u, logits.stride_v, logits.stride_h, logits.stride_w)


@triton.jit
def split_target(row, col, WINDOW: tl.constexpr):
    """Return the sub-row and sub-column of an output location, and the row and column of its cell."""
    return row % WINDOW.up, col % WINDOW.up, row // WINDOW.up, col // WINDOW.up


@triton.jit
def place_targets(m, HALO: tl.constexpr, WINDOW: tl.constexpr, LAYOUT: tl.constexpr):
    """Return the rows and columns in a tile of its targets m, and what `split_target` returns, with cells counted from those of the tile.

    Targets are ordered by cells where the logits of a cell are a run, and by rows otherwise.
    """
    if LAYOUT.cell_align > 0:
        UP: tl.constexpr = WINDOW.up
        CELLS_W: tl.constexpr = HALO.cols // UP
        sub, cell = m % (UP * UP), m // (UP * UP)
        q, r = cell // CELLS_W, cell % CELLS_W
        # the compiler finds contiguous sub-pixels only if they are one axis
        return q * UP + sub // UP, r * UP + sub % UP, 0, sub, q, r
    else:
        i, j = m // HALO.cols, m % HALO.cols
        u, v, q, r = split_target(i, j, WINDOW)
        return i, j, u, v, q, r


@triton.jit
def logit_offset(logits: Logits, u, v, q, r):
    """Return the offset of the first tap of a window, given what `split_target` returns."""
    return u * logits.stride_u + v * logits.stride_v + q * logits.stride_h + r * logits.stride_w


@triton.jit
def window_offset(logits: Logits, row, col, WINDOW: tl.constexpr):
    """Return the offset of the first tap of the window of an output location."""
    if WINDOW.weighed:
        return row * logits.stride_u + col * logits.stride_v
    else:
        u, v, q, r = split_target(row, col, WINDOW)
        return logit_offset(logits, u, v, q, r)


@triton.jit
def logit_addresses(logits: Logits, tap, offset, WINDOW: tl.constexpr, LAYOUT: tl.constexpr):
    """Return the addresses of taps [T, 1] of windows at offsets [1, M]."""
    # an even number of sub-pixels looks contiguous
    if LAYOUT.y_axis == 1 or (LAYOUT.cell_align > 0 and WINDOW.up % 2 == 1 and WINDOW.up > 1):
        return along_rows(logits.ptr + offset, tap * logits.stride_c)
    else:
        return logits.ptr + offset + tap * logits.stride_c


@triton.jit
def lse_address(lse_ptr, sizes: Sizes, ng, u, v, q, r, WINDOW: tl.constexpr):
    """Return the address of the log-sum-exp of a window, given what `split_target` returns and its group counted over all images."""
    return lse_ptr + (((ng * WINDOW.up + u) * WINDOW.up + v) * sizes.hq + q) * sizes.wq + r


@triton.jit
def normalize_tile(
    sizes: Sizes,
    logits: Logits,
    lse_ptr,
    ng,
    n,
    g,
    q0,
    r0,
    stores,
    WINDOW: tl.constexpr,
    HALO: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Return the weights [T, M] of the windows of a tile whose first cell is (q0, r0), and store their log-sum-exp if `stores`.

    Weights are zero from the last tap on, and not defined where a target does not exist.
    """
    K: tl.constexpr = WINDOW.kernel_size
    UP: tl.constexpr = WINDOW.up
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
        if stores:
            tl.store(lse_address(lse_ptr, sizes, ng.to(tl.int64), u, v, q, r, WINDOW), top + log(total), mask=exists)
        return w
    else:
        return tl.where(taps, weight(l, 0.0, WINDOW), 0.0)


@triton.jit
def store_weights(weights: Logits, w, t, row, col, mask):
    """Store the weights of taps t of windows [T, M] at the resolution of the output; the record is that of a group."""
    address = weights.ptr + (row * weights.stride_u + col * weights.stride_v)[None, :] + (t * weights.stride_c)[:, None]
    tl.store(address, w.to(weights.ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_logit_gradient(
    sizes: Sizes,
    logits: Logits,
    lse_ptr,
    dlogits: Logits,
    dw,
    row,
    col,
    u,
    v,
    q,
    r,
    exists,
    WINDOW: tl.constexpr,
    HALO: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Store the gradient to the logits of windows [M] from that to their weights [T, M], and return the weights.

    Records are those of a group.
    """
    K: tl.constexpr = WINDOW.kernel_size
    t = tl.arange(0, HALO.t).to(LAYOUT.index)
    taps = (t < K * K)[:, None] & exists[None, :]
    l = tl.load(
        logit_addresses(logits, t[:, None], logit_offset(logits, u, v, q, r)[None, :], WINDOW, LAYOUT),
        mask=taps,
        other=-float("inf") if WINDOW.normalized else 0.0,
    ).to(tl.float32)
    if WINDOW.border == "renormalize":
        l = tl.where(is_left_out(row[None, :], col[None, :], t[:, None], sizes, WINDOW), -float("inf"), l)
    lse = tl.zeros(q.shape, tl.float32)
    if WINDOW.normalized:
        lse = tl.load(lse_address(lse_ptr, sizes, 0, u, v, q, r, WINDOW), mask=exists, other=0.0)
    w = weight(l, lse[None, :], WINDOW)
    # targets that a rational scale cuts off have a gradient of zero
    dl = logit_gradient(l, w, dw, tl.sum(w * dw, axis=0)[None, :], WINDOW)
    tl.store(
        logit_addresses(dlogits, t[:, None], logit_offset(dlogits, u, v, q, r)[None, :], WINDOW, LAYOUT),
        dl.to(dlogits.ptr.dtype.element_ty),
        mask=taps,
    )
    return w
