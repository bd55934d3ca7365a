"""The operator tap by tap, for any window, any scale, any border and any strides. The banded kernels are faster where they apply.

N is the batch, C the channels of one group, G the groups and K the kernel size. The source has H x W locations, the output HO x WO, and the
logits HQ x WQ cells. A rational scale may cut the last cell: its targets beyond HO, WO have a log-sum-exp and a zero gradient, and no
output.

    y[m] = sum_t w[m, t] x[window(m) + t]
    dw[m, t] = sum_c dy[m, c] x[window(m) + t, c]
    dx[s] = sum_t sum_{m: window(m) + t = s} w[m, t] dy[m]

The gradient dx of the borders "replicate" and "shift" is in padded_taps.py.

A program computes BLOCK_M locations of one group of one image. Its blocks of features are [BLOCK_M, BLOCK_C] if channels are the fastest
axis of the features, and [BLOCK_C, BLOCK_M] otherwise. AXIS is the axis of the locations.
"""

import triton
import triton.language as tl

from ..common.blocks import along_rows
from ..common.records import Features, Logits, Sizes
from ..common.special import exp, log
from ..common.window import centre, group_logits, is_left_out, logit_gradient, logit_offset, lse_address, score, split_target, weight


@triton.jit
def split_program(rows, cols, BLOCK_M: tl.constexpr):
    """Return the image and group, row and column of every location of this program, and whether the location exists."""
    blocks = tl.cdiv(rows * cols, BLOCK_M)
    m = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return (tl.program_id(0) // blocks).to(tl.int64), m // cols, m % cols, m < rows * cols


@triton.jit
def clamp(value, low, high):
    """Return the nearest number to `value` from `low` to `high`."""
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def tap_score(l_ptr, tap, stride_c, row, col, mask, sizes: Sizes, WINDOW: tl.constexpr):
    """Return the unnormalised log-weight of one tap of every target's window, minus infinity where it is left out of the window."""
    value = score(tl.load(l_ptr + tap * stride_c, mask=mask, other=0.0).to(tl.float32), WINDOW)
    if WINDOW.border == "renormalize":
        value = tl.where(is_left_out(row, col, tap, sizes, WINDOW), -float("inf"), value)
    return value


@triton.jit
def tap_source(row, col, tap, mask, sizes, WINDOW: tl.constexpr):
    """Return the source row and column of one tap of every target's window, and whether it lies inside the map."""
    K: tl.constexpr = WINDOW.kernel_size
    i, j = centre(row, WINDOW), centre(col, WINDOW)
    if WINDOW.border == "shift":
        i, j = clamp(i, K // 2, sizes.h - 1 - K // 2), clamp(j, K // 2, sizes.w - 1 - K // 2)
    i = i + tap // K - K // 2
    j = j + tap % K - K // 2
    if WINDOW.border == "replicate":
        i, j = clamp(i, 0, sizes.h - 1), clamp(j, 0, sizes.w - 1)
    return i, j, mask & (i >= 0) & (i < sizes.h) & (j >= 0) & (j < sizes.w)


@triton.jit
def block_addresses(ptr, channels, AXIS: tl.constexpr):
    """Return the addresses of a block of features, given those of its locations and the offsets of its channels."""
    if AXIS == 1:
        return along_rows(ptr, channels)
    else:
        return ptr + channels


@triton.jit
def tap_forward(
    sizes: Sizes,
    x: Features,  # [N, G * C, H, W]
    logits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    y: Features,  # [N, G * C, HO, WO]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    WINDOW: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Fill y and, where weights are normalized, the log-sum-exp of every window."""
    K: tl.constexpr = WINDOW.kernel_size
    ng, row, col, mask = split_program(sizes.hq * WINDOW.up, sizes.wq * WINDOW.up, BLOCK_M)
    n, g = ng // sizes.groups, ng % sizes.groups
    logits = group_logits(logits, n, g, WINDOW)
    u, v, q, r = split_target(row, col, WINDOW)
    l_ptr = logits.ptr + logit_offset(logits, u, v, q, r)
    lse = tl.zeros([BLOCK_M], tl.float32)
    if WINDOW.normalized:
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        for tap in range(K * K):
            top = tl.maximum(top, tap_score(l_ptr, tap, logits.stride_c, row, col, mask, sizes, WINDOW))
        for tap in range(K * K):
            lse += exp(tap_score(l_ptr, tap, logits.stride_c, row, col, mask, sizes, WINDOW) - top)
        lse = top + log(lse)
        tl.store(lse_address(lse_ptr, sizes, ng, u, v, q, r, WINDOW), lse, mask=mask)
    mask = mask & (row < sizes.ho) & (col < sizes.wo)
    x_ptr = x.ptr + (n * x.stride_n + g * sizes.c * x.stride_c)
    y_ptr = y.ptr + (n * y.stride_n + g * sizes.c * y.stride_c + tl.expand_dims(row * y.stride_h + col * y.stride_w, 1 - AXIS))
    for start in range(0, sizes.c, BLOCK_C):
        c = tl.expand_dims(start + tl.arange(0, BLOCK_C), AXIS).to(tl.int64)
        target = tl.zeros([BLOCK_M, BLOCK_C] if AXIS == 0 else [BLOCK_C, BLOCK_M], tl.float32)
        for tap in range(K * K):
            i, j, inside = tap_source(row, col, tap, mask, sizes, WINDOW)
            # a tap outside the map gets the weight 0: that of a logit of 0 overflows where all logits of the window are low
            logit = tl.load(l_ptr + tap * logits.stride_c, mask=inside, other=-float("inf") if WINDOW.normalized else 0.0)
            w = weight(logit.to(tl.float32), lse, WINDOW)
            source = tl.load(
                block_addresses(x_ptr + tl.expand_dims(i * x.stride_h + j * x.stride_w, 1 - AXIS), c * x.stride_c, AXIS),
                mask=tl.expand_dims(inside, 1 - AXIS) & (c < sizes.c),
                other=0.0,
            )
            target += tl.expand_dims(w, 1 - AXIS) * source.to(tl.float32)
        tl.store(
            block_addresses(y_ptr, c * y.stride_c, AXIS),
            target.to(y.ptr.dtype.element_ty),
            mask=tl.expand_dims(mask, 1 - AXIS) & (c < sizes.c),
        )


@triton.jit
def tap_logit_gradient(
    sizes: Sizes,
    x: Features,  # [N, G * C, H, W]
    logits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    dy: Features,  # [N, G * C, HO, WO]
    dlogits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    WINDOW: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Fill dlogits."""
    K: tl.constexpr = WINDOW.kernel_size
    NORMALIZED: tl.constexpr = WINDOW.normalized
    ng, row, col, mask = split_program(sizes.hq * WINDOW.up, sizes.wq * WINDOW.up, BLOCK_M)
    n, g = ng // sizes.groups, ng % sizes.groups
    logits = group_logits(logits, n, g, WINDOW)
    dlogits = group_logits(dlogits, n, g, WINDOW)
    u, v, q, r = split_target(row, col, WINDOW)
    l_ptr = logits.ptr + logit_offset(logits, u, v, q, r)
    dl_ptr = dlogits.ptr + logit_offset(dlogits, u, v, q, r)
    lse = tl.zeros([BLOCK_M], tl.float32)
    if NORMALIZED:
        lse = tl.load(lse_address(lse_ptr, sizes, ng, u, v, q, r, WINDOW), mask=mask, other=0.0)
    output = mask & (row < sizes.ho) & (col < sizes.wo)
    x_ptr = x.ptr + (n * x.stride_n + g * sizes.c * x.stride_c)
    dy_ptr = dy.ptr + (n * dy.stride_n + g * sizes.c * dy.stride_c + tl.expand_dims(row * dy.stride_h + col * dy.stride_w, 1 - AXIS))
    mean = tl.zeros([BLOCK_M], tl.float32)
    # the gradients of these normalizers need a sum over the window, which a first pass over the taps computes
    for step in range(2 * K * K if NORMALIZED else K * K):
        tap = step % (K * K)
        i, j, inside = tap_source(row, col, tap, output, sizes, WINDOW)
        s_ptr = x_ptr + tl.expand_dims(i * x.stride_h + j * x.stride_w, 1 - AXIS)
        dw = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, sizes.c, BLOCK_C):
            c = tl.expand_dims(start + tl.arange(0, BLOCK_C), AXIS).to(tl.int64)
            both = tl.expand_dims(inside, 1 - AXIS) & (c < sizes.c)
            source = tl.load(block_addresses(s_ptr, c * x.stride_c, AXIS), mask=both, other=0.0).to(tl.float32)
            gradient = tl.load(block_addresses(dy_ptr, c * dy.stride_c, AXIS), mask=both, other=0.0).to(tl.float32)
            dw += tl.sum(source * gradient, axis=1 - AXIS)
        logit = tl.load(l_ptr + tap * logits.stride_c, mask=mask, other=0.0).to(tl.float32)
        w = weight(logit, lse, WINDOW)
        if WINDOW.border == "renormalize":
            w = tl.where(inside, w, 0.0)
        if NORMALIZED and step < K * K:
            mean += w * dw
        else:
            dl = logit_gradient(logit, w, dw, mean, WINDOW)
            tl.store(dl_ptr + tap * dlogits.stride_c, tl.where(output, dl, 0.0).to(dlogits.ptr.dtype.element_ty), mask=mask)


@triton.jit
def tap_source_gradient(
    sizes: Sizes,
    logits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    dy: Features,  # [N, G * C, HO, WO]
    dx: Features,  # [N, G * C, H, W]
    WINDOW: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Fill dx."""
    K: tl.constexpr = WINDOW.kernel_size
    UP: tl.constexpr = WINDOW.up
    DOWN: tl.constexpr = WINDOW.down
    # at most this many target rows (columns) are centred on one source row (column)
    SHARING: tl.constexpr = (UP + DOWN - 1) // DOWN
    ng, i, j, mask = split_program(sizes.h, sizes.w, BLOCK_M)
    n, g = ng // sizes.groups, ng % sizes.groups
    logits = group_logits(logits, n, g, WINDOW)
    dy_ptr = dy.ptr + (n * dy.stride_n + g * sizes.c * dy.stride_c)
    # expanded before use, because Triton 3.6 gives masks that are expanded later a different layout from their pointers
    i, j, mask = tl.expand_dims(i, 1 - AXIS), tl.expand_dims(j, 1 - AXIS), tl.expand_dims(mask, 1 - AXIS)
    dx_ptr = dx.ptr + (n * dx.stride_n + g * sizes.c * dx.stride_c + i * dx.stride_h + j * dx.stride_w)
    for start in range(0, sizes.c, BLOCK_C):
        c = tl.expand_dims(start + tl.arange(0, BLOCK_C), AXIS).to(tl.int64)
        block = tl.zeros([BLOCK_M, BLOCK_C] if AXIS == 0 else [BLOCK_C, BLOCK_M], tl.float32)
        for step in range(K * K * SHARING * SHARING):
            tap = step % (K * K)
            # the targets centred on row mi are the first at or after mi * UP / DOWN and the following ones
            mi = i + K // 2 - tap // K
            mj = j + K // 2 - tap % K
            row = (tl.maximum(mi, 0) * UP + DOWN - 1) // DOWN + step // (K * K * SHARING)
            col = (tl.maximum(mj, 0) * UP + DOWN - 1) // DOWN + step // (K * K) % SHARING
            inside = mask & (row < sizes.ho) & (col < sizes.wo) & (row * DOWN < (mi + 1) * UP) & (col * DOWN < (mj + 1) * UP)
            u, v, q, r = split_target(row, col, WINDOW)
            lse = tl.zeros(i.shape, tl.float32)
            if WINDOW.normalized:
                lse = tl.load(lse_address(lse_ptr, sizes, ng, u, v, q, r, WINDOW), mask=inside, other=0.0)
            logit = tl.load(logits.ptr + tap * logits.stride_c + logit_offset(logits, u, v, q, r), mask=inside, other=0.0)
            w = weight(logit.to(tl.float32), lse, WINDOW)
            gradient = tl.load(
                block_addresses(dy_ptr + row * dy.stride_h + col * dy.stride_w, c * dy.stride_c, AXIS),
                mask=inside & (c < sizes.c),
                other=0.0,
            )
            block += w * gradient.to(tl.float32)
        tl.store(block_addresses(dx_ptr, c * dx.stride_c, AXIS), block.to(dx.ptr.dtype.element_ty), mask=mask & (c < sizes.c))
