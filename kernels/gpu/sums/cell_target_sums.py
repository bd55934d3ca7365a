"""The gradient to the features in NCHW of down 2 as a sum over the targets that read a pixel, with weights in registers.

    dx[p] = sum_t sum_{targets m: window(m) + t = p} w[m, t] dy[m]

A thread computes the 2 x 4 pixels of two neighbouring cells. It computes the weights of the targets that read them, keeps these in
registers for all channels of a program, and loads each of the targets once for all of its pixels. Neighbouring threads compute neighbouring
pixels, so that a warp reads and writes rows of pixels. Neither shared memory nor matrix units are needed, and no thread waits for another.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common.blocks import align_sizes, align_strides, find_tile, image, split_group
from ..common.records import Features, Logits, Sizes
from ..common.vectors import advance, as_offset, join4, load_vector
from ..common.window import group_logits, lse_address, weight, widen_taps
from .taps import clamp


class Blocks(NamedTuple):
    """The blocks of pixels of a program. A constant."""

    rows: int
    cols: int
    vector: int  # targets of one load
    align: int  # of up 2: every row of logits begins and ends at a multiple of this number of elements


class Share(NamedTuple):
    """The division of the channels of a group among programs."""

    programs: int
    channels: int  # of each program


@triton.jit
def load_row(ptr, row, cols, VECTOR: tl.constexpr):
    """Return a row of targets, a vector at each of the offsets `cols` from `row`."""
    targets = ()
    for k in tl.static_range(len(cols)):
        targets += load_vector(ptr + as_offset(row + cols[k]), VECTOR)
    return targets


@triton.jit
def load_lse(lse_ptr, ng, u, v, q, r, exists, sizes: Sizes, WINDOW: tl.constexpr):
    """Return the log-sum-exp of windows; zero where weights are not normalized and where the target does not exist."""
    if WINDOW.normalized:
        inside = exists & (q >= 0) & (q < sizes.hq) & (r >= 0) & (r < sizes.wq)
        return tl.load(lse_address(lse_ptr, sizes, ng.to(tl.int64), u, v, q, r, WINDOW), mask=inside, other=0.0)
    else:
        return tl.zeros(q.shape, tl.float32)


@triton.jit
def load_weight(ptr, lse, inside, WINDOW: tl.constexpr):
    """Return the weights of logits at `ptr`; zero where they are not those of a target."""
    logit = tl.load(ptr, mask=inside, other=0.0)
    return tl.where(inside, weight(logit.to(tl.float32), lse, WINDOW), 0.0)


@triton.jit
def weigh_tap(logits: Logits, lse, q, r, KY: tl.constexpr, KX: tl.constexpr, exists, sizes: Sizes, WINDOW: tl.constexpr):
    """Return the weights by which targets read pixels of the cells (q, r) with one tap."""
    RADIUS: tl.constexpr = WINDOW.kernel_size // 2
    # the place of the target among those that read the cell; the tap decides which pixel of the cell it reads
    A: tl.constexpr = ((KY + RADIUS) % 2 + RADIUS - KY) // 2 + RADIUS // 2
    B: tl.constexpr = ((KX + RADIUS) % 2 + RADIUS - KX) // 2 + RADIUS // 2
    q, r = q + (A - RADIUS // 2), r + (B - RADIUS // 2)
    ptr = logits.ptr + ((KY * WINDOW.kernel_size + KX) * logits.stride_c + q * logits.stride_h + r * logits.stride_w)
    inside = exists & (q >= 0) & (q < sizes.hq) & (r >= 0) & (r < sizes.wq)
    return load_weight(ptr, lse[A * (RADIUS + 1) + B], inside, WINDOW)


@triton.jit
def weigh_cell(logits: Logits, lse_ptr, ng, q, r, exists, sizes: Sizes, WINDOW: tl.constexpr):
    """Return the weights by which targets read the pixels of the cells (q, r), ordered by taps."""
    K: tl.constexpr = WINDOW.kernel_size
    SPAN: tl.constexpr = K // 2 + 1
    lse = ()
    for k in tl.static_range(SPAN * SPAN):
        lse += (load_lse(lse_ptr, ng, 0, 0, q + (k // SPAN - K // 4), r + (k % SPAN - K // 4), exists, sizes, WINDOW),)
    weights = ()
    for t in tl.static_range(K * K):
        weights += (weigh_tap(logits, lse, q, r, t // K, t % K, exists, sizes, WINDOW),)
    return weights


@triton.jit
def add_targets(s, targets, weights, ROW: tl.constexpr, PIXEL: tl.constexpr, WINDOW: tl.constexpr):
    """Add a row of targets to the sums of one pixel of every block; ROW counts from the first row that reads the block."""
    K: tl.constexpr = WINDOW.kernel_size
    RADIUS: tl.constexpr = K // 2
    CELL: tl.constexpr = PIXEL // 2 % 2
    KY: tl.constexpr = PIXEL // 4 + RADIUS + 2 * (RADIUS // 2 - ROW)
    # the column of the pixel in the window of the first target that reads its cell
    KX: tl.constexpr = PIXEL % 2 + RADIUS + 2 * (RADIUS // 2)
    if KY >= 0 and KY < K:
        for b in tl.static_range(RADIUS + 1):
            if KX - 2 * b >= 0 and KX - 2 * b < K:
                s += weights[(CELL * K + KY) * K + KX - 2 * b] * targets[CELL + b]
    return s


@triton.jit
def sum_cell_targets(
    sizes: Sizes,
    logits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    dy: Features,  # [N, G * C, HO, WO]
    dx: Features,  # [N, G * C, H, W]
    share: Share,
    WINDOW: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Fill dx; one program computes a share of the channels of a rectangle of blocks of 2 x 4 pixels."""
    RADIUS: tl.constexpr = WINDOW.kernel_size // 2
    COLS: tl.constexpr = BLOCKS.cols
    VECTOR: tl.constexpr = BLOCKS.vector
    # columns of targets before the first cell of a block, and from it on in pairs, which begin at even columns
    BEFORE: tl.constexpr = RADIUS // 2
    PAIRED: tl.constexpr = 2 + (RADIUS + 1) // 4 * 2
    sizes = align_sizes(sizes, LAYOUT)
    dy = align_strides(dy, 1, LAYOUT.y_align)
    dx = align_strides(dx, 1, LAYOUT.x_align)
    pid = tl.program_id(0)
    first = pid % share.programs * share.channels
    last = tl.minimum(sizes.c, first + share.channels)
    q0, r0, ng = find_tile(pid // share.programs, tl.cdiv(sizes.hq, BLOCKS.rows), tl.cdiv(sizes.wq, 2 * COLS))
    n, g = split_group(ng, sizes)
    m = tl.arange(0, BLOCKS.rows * COLS).to(LAYOUT.index)
    q, r = q0 * BLOCKS.rows + m // COLS, (r0 * COLS + m % COLS) * 2
    exists = (q < sizes.hq) & (r < sizes.wq)
    logits = widen_taps(group_logits(logits, n, g, WINDOW), LAYOUT)
    weights = weigh_cell(logits, lse_ptr, ng, q, r, exists, sizes, WINDOW)
    weights += weigh_cell(logits, lse_ptr, ng, q, r + 1, exists, sizes, WINDOW)

    dy = image(dy, n, g * sizes.c)
    dx = image(dx, n, g * sizes.c)
    rows, cols = (), ()
    for k in tl.static_range(RADIUS + 1):
        rows += (clamp(q + (k - BEFORE), 0, sizes.hq - 1) * dy.stride_h,)
    for k in tl.static_range(RADIUS + 2):
        if k < BEFORE or k >= BEFORE + PAIRED:
            cols += (clamp(r + (k - BEFORE), 0, sizes.wq - 1) * dy.stride_w,)
        elif (k - BEFORE) % VECTOR == 0:
            cols += (clamp((r + (k - BEFORE)) // VECTOR, 0, sizes.wq // VECTOR - 1) * VECTOR * dy.stride_w,)
    # a column costs no instruction; offsets of rows change, so that no sums of both wait in registers
    rows = advance(rows, cols[BEFORE] + first.to(LAYOUT.index) * dy.stride_c)
    cols = advance(cols, -cols[BEFORE])
    place = tl.arange(0, 4).to(LAYOUT.index)[None, :]
    there = (r * 2)[:, None] + place < sizes.w
    to = (q * 2 * dx.stride_h + first.to(LAYOUT.index) * dx.stride_c)[:, None] + ((r * 2)[:, None] + place) * dx.stride_w
    upper, lower = there & (q * 2 < sizes.h)[:, None], there & (q * 2 + 1 < sizes.h)[:, None]
    for _ in range(first, last):
        sums = (tl.zeros(q.shape, tl.float32),) * 8
        for k in tl.static_range(RADIUS + 1):
            targets = load_row(dy.ptr, rows[k], cols[:BEFORE], 1)
            targets += load_row(dy.ptr, rows[k], cols[BEFORE : BEFORE + PAIRED // VECTOR], VECTOR)
            targets += load_row(dy.ptr, rows[k], cols[BEFORE + PAIRED // VECTOR :], 1)
            moved = ()
            for p in tl.static_range(8):
                moved += (add_targets(sums[p], targets, weights, k, p, WINDOW),)
            sums = moved
        tl.store(dx.ptr + as_offset(to), join4(sums[0], sums[1], sums[2], sums[3]).to(dx.ptr.dtype.element_ty), mask=upper)
        tl.store(dx.ptr + as_offset(to + dx.stride_h), join4(sums[4], sums[5], sums[6], sums[7]).to(dx.ptr.dtype.element_ty), mask=lower)
        rows = advance(rows, dy.stride_c)
        to += dx.stride_c
