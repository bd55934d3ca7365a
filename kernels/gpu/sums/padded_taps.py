"""The gradient to the features, tap by tap, for windows that read pixels of the map outside it: the borders "replicate" and "shift".

    dx[s] = sum_m dy[m] sum_{t: tap t of the window of m reads s} w[m, t]

Several taps of a window read the same pixel with "replicate". Along each axis, they follow one another.
"""

import triton
import triton.language as tl

from ..common.records import Features, Logits, Sizes
from ..common.window import centre, group_logits, logit_offset, lse_address, split_target, weight
from .taps import block_addresses, clamp, split_program


@triton.jit
def reading_targets(i, size, WINDOW: tl.constexpr):
    """Return the first target row (column) whose window can read source i of `size`, and how many follow at most, with the first."""
    RADIUS: tl.constexpr = WINDOW.kernel_size // 2
    low, high = tl.maximum(i - RADIUS, 0), tl.minimum(i + RADIUS, size - 1)
    if WINDOW.border == "shift":
        # the windows that move all lie at the border
        low = tl.where(low <= RADIUS, 0, low)
        high = tl.where(high >= size - 1 - RADIUS, size - 1, high)
    first = (low * WINDOW.up + WINDOW.down - 1) // WINDOW.down
    end = ((high + 1) * WINDOW.up + WINDOW.down - 1) // WINDOW.down
    return first, tl.max(end - first).to(tl.int32)


@triton.jit
def reading_taps(target, i, size, WINDOW: tl.constexpr):
    """Return the first and the last tap with which a target row (column) reads source i of `size`; the last is less if there is none."""
    K: tl.constexpr = WINDOW.kernel_size
    middle = centre(target, WINDOW)
    if WINDOW.border == "shift":
        middle = clamp(middle, K // 2, size - 1 - K // 2)
    first = i - middle + K // 2
    last = first
    if WINDOW.border == "replicate":
        first = tl.where(i == 0, 0, first)
        last = tl.where(i == size - 1, K - 1, last)
    return tl.maximum(first, 0), tl.minimum(last, K - 1)


@triton.jit
def padded_source_gradient(
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
    ng, i, j, mask = split_program(sizes.h, sizes.w, BLOCK_M)
    n, g = ng // sizes.groups, ng % sizes.groups
    logits = group_logits(logits, n, g, WINDOW)
    dy_ptr = dy.ptr + (n * dy.stride_n + g * sizes.c * dy.stride_c)
    i, j, mask = tl.expand_dims(i, 1 - AXIS), tl.expand_dims(j, 1 - AXIS), tl.expand_dims(mask, 1 - AXIS)
    dx_ptr = dx.ptr + (n * dx.stride_n + g * sizes.c * dx.stride_c + i * dx.stride_h + j * dx.stride_w)
    first_row, rows = reading_targets(i, sizes.h, WINDOW)
    first_col, cols = reading_targets(j, sizes.w, WINDOW)
    for start in range(0, sizes.c, BLOCK_C):
        c = tl.expand_dims(start + tl.arange(0, BLOCK_C), AXIS).to(tl.int64)
        block = tl.zeros([BLOCK_M, BLOCK_C] if AXIS == 0 else [BLOCK_C, BLOCK_M], tl.float32)
        for step in range(rows * cols):
            row, col = first_row + step // cols, first_col + step % cols
            top, bottom = reading_taps(row, i, sizes.h, WINDOW)
            left, right = reading_taps(col, j, sizes.w, WINDOW)
            reads = mask & (row < sizes.ho) & (col < sizes.wo) & (top <= bottom) & (left <= right)
            u, v, q, r = split_target(row, col, WINDOW)
            lse = tl.zeros(i.shape, tl.float32)
            if WINDOW.normalized:
                lse = tl.load(lse_address(lse_ptr, sizes, ng, u, v, q, r, WINDOW), mask=reads, other=0.0)
            w = tl.zeros(i.shape, tl.float32)
            height, width = tl.max(bottom - top).to(tl.int32) + 1, tl.max(right - left).to(tl.int32) + 1
            for part in range(tl.maximum(height, 0) * tl.maximum(width, 0)):
                ky, kx = top + part // width, left + part % width
                taken = reads & (ky <= bottom) & (kx <= right)
                logit = tl.load(logits.ptr + (ky * K + kx) * logits.stride_c + logit_offset(logits, u, v, q, r), mask=taken, other=0.0)
                w += tl.where(taken, weight(logit.to(tl.float32), lse, WINDOW), 0.0)
            gradient = tl.load(
                block_addresses(dy_ptr + row * dy.stride_h + col * dy.stride_w, c * dy.stride_c, AXIS),
                mask=reads & (c < sizes.c),
                other=0.0,
            )
            block += w * gradient.to(tl.float32)
        tl.store(block_addresses(dx_ptr, c * dx.stride_c, AXIS), block.to(dx.ptr.dtype.element_ty), mask=mask & (c < sizes.c))
