"""The gradient to float32 features in channels_last of up 2 as a sum over the targets that read a pixel, after their weights.

    dx[p] = sum_t sum_{targets m of the cell p - t} w[m, t] dy[m]

A thread computes 2 x 4 pixels. It loads the gradients of the four targets of a cell once for all of them, and keeps the sums in registers,
as forward does (tap_sums.py).
"""

from typing import Any

import triton
import triton.language as tl

from ..common.blocks import addresses, align_sizes, align_strides, find_tile, image, load, split_group, store
from ..common.records import Features, Layout, Sizes, Window
from ..launch import INT32_MAX, Launch
from ..tiles.geometry import TileProblem
from .tap_sums import MAX_REGISTERS, WARP_SIZE, divide_sums, first_weight, has_room, split_targets, target_bytes, weigh_launch
from .taps import clamp

# bytes of the gradient of the output from which the sums are taken: below it, they have too few programs for a device
SMALLEST = 2**25
# largest side of a window: every column of cells that read a pixel is code of its own, which takes half a minute to compile at 9
LARGEST = 7
# rows and columns of pixels of a thread
ROWS, COLS = 2, 4
# sums of a thread for one of its pixels
SUMS_OF_THREAD = 4
# half as many programs as of four warps, because a program also reads the targets around its pixels
WARPS = 8


@triton.jit
def load_target(dy: Features, row, col, c, sizes: Sizes, SUMS: tl.constexpr):
    """Return the gradients of targets (row, col), or of the last one of the row or column."""
    row, col = tl.minimum(row, sizes.ho - 1), tl.minimum(col, sizes.wo - 1)
    if SUMS.whole:
        return tl.load(addresses(dy, row, col, c, 0, 1))
    else:
        return load(dy, row, col, row >= 0, c, sizes.c, 0, 1)


@triton.jit
def add_cell(s, g0, g1, g2, g3, w_ptr, exists, CELL: tl.constexpr, KX: tl.constexpr, WINDOW: tl.constexpr):
    """Add the targets of cells to the sums of the pixels in column KX of their windows; CELL cells follow those at `w_ptr`."""
    K: tl.constexpr = WINDOW.kernel_size
    if KX >= 0 and KX < K:
        # a constant, which is a part of the instruction that loads
        w_ptr += (CELL * K * K + KX) * 4
        weights = tl.load(w_ptr[:, None] + tl.arange(0, 4)[None, :], mask=exists[:, None], other=0.0)
        w0, w1, w2, w3 = split_targets(weights)
        s += w0[:, None] * g0
        s += w1[:, None] * g1
        s += w2[:, None] * g2
        s += w3[:, None] * g3
    return s


@triton.jit
def add_cells(s0, s1, s2, s3, g0, g1, g2, g3, w_ptr, exists, CELL: tl.constexpr, WINDOW: tl.constexpr):
    """Add the targets of cells to the sums of four neighbouring pixels."""
    LAST: tl.constexpr = WINDOW.kernel_size - 1 - CELL
    s0 = add_cell(s0, g0, g1, g2, g3, w_ptr, exists, CELL, LAST, WINDOW)
    s1 = add_cell(s1, g0, g1, g2, g3, w_ptr, exists, CELL, LAST + 1, WINDOW)
    s2 = add_cell(s2, g0, g1, g2, g3, w_ptr, exists, CELL, LAST + 2, WINDOW)
    s3 = add_cell(s3, g0, g1, g2, g3, w_ptr, exists, CELL, LAST + 3, WINDOW)
    return s0, s1, s2, s3


@triton.jit
def store_pixels(dx: Features, i, j, c, s0, s1, s2, s3, sizes: Sizes):
    """Store four neighbouring pixels."""
    store(dx, i, j, (i < sizes.h) & (j < sizes.w), c, sizes.c, s0, 0, 1)
    store(dx, i, j + 1, (i < sizes.h) & (j + 1 < sizes.w), c, sizes.c, s1, 0, 1)
    store(dx, i, j + 2, (i < sizes.h) & (j + 2 < sizes.w), c, sizes.c, s2, 0, 1)
    store(dx, i, j + 3, (i < sizes.h) & (j + 3 < sizes.w), c, sizes.c, s3, 0, 1)


@triton.jit
def sum_targets(
    sizes: Sizes,
    weights_ptr,  # [N * G, sites, K * K, 4]
    dy: Features,  # [N, G * C, HO, WO]
    dx: Features,  # [N, G * C, H, W]
    WINDOW: tl.constexpr,
    LAYOUT: tl.constexpr,
    SUMS: tl.constexpr,
    GROUPS_H: tl.constexpr,
    GROUPS_W: tl.constexpr,
):
    """Fill dx; one program computes a block of channels of GROUPS_H x GROUPS_W groups of 2 x 4 pixels."""
    K: tl.constexpr = WINDOW.kernel_size
    M: tl.constexpr = GROUPS_H * GROUPS_W
    BLOCK_C: tl.constexpr = SUMS.block_c
    sizes = align_sizes(sizes, LAYOUT)
    dy = align_strides(dy, 0, LAYOUT.y_align)
    dx = align_strides(dx, 0, LAYOUT.x_align)
    pid = tl.program_id(0)
    parts = tl.cdiv(sizes.c, BLOCK_C)
    c = pid % parts * BLOCK_C + tl.arange(0, BLOCK_C).to(LAYOUT.index)
    q0, r0, ng = find_tile(pid // parts, tl.cdiv(sizes.h, 2 * GROUPS_H), tl.cdiv(sizes.w, 4 * GROUPS_W))
    n, g = split_group(ng, sizes)
    m = tl.arange(0, M).to(LAYOUT.index)
    i, j = (q0 * GROUPS_H + m // GROUPS_W) * 2, (r0 * GROUPS_W + m % GROUPS_W) * 4
    dy = image(dy, n, g * sizes.c)
    dx = image(dx, n, g * sizes.c)
    weights_ptr = first_weight(weights_ptr, ng, sizes.h, sizes.w, j - K // 2, WINDOW, SUMS)

    zero = tl.zeros([M, BLOCK_C], tl.float32)
    a0, a1, a2, a3 = zero, zero, zero, zero
    b0, b1, b2, b3 = zero, zero, zero, zero
    for step in range(K + 1):
        # every other row, and then the rows between: L1 holds most rows of a step from the step before
        above = 2 * step - step // (K // 2 + 1) * K
        q = i - K // 2 + above
        near = clamp(q, 0, sizes.h - 1)
        # the weights of the rows of the windows in which the upper and the lower pixels are
        upper_ptr = weights_ptr + (near * sizes.w * K + K - 1 - above) * (K * 4)
        lower_ptr = upper_ptr + K * 4
        for cell in tl.static_range(K + 3):
            r = j - K // 2 + cell
            exists = (q >= 0) & (q < sizes.h) & (r >= 0) & (r < sizes.w)
            row, col = near * 2, clamp(r, 0, sizes.w - 1) * 2
            g0, g1 = load_target(dy, row, col, c, sizes, SUMS), load_target(dy, row, col + 1, c, sizes, SUMS)
            g2, g3 = load_target(dy, row + 1, col, c, sizes, SUMS), load_target(dy, row + 1, col + 1, c, sizes, SUMS)
            if above < K:
                a0, a1, a2, a3 = add_cells(a0, a1, a2, a3, g0, g1, g2, g3, upper_ptr, exists, cell, WINDOW)
            if above > 0:
                b0, b1, b2, b3 = add_cells(b0, b1, b2, b3, g0, g1, g2, g3, lower_ptr, exists, cell, WINDOW)
    store_pixels(dx, i, j, c, a0, a1, a2, a3, sizes)
    store_pixels(dx, i + 1, j, c, b0, b1, b2, b3, sizes)


def sums_targets(problem: TileProblem) -> bool:
    """Return whether the gradient to the features sums over targets, and has no tile."""
    spec = problem.spec
    regular = (spec.up, spec.down) == (2, 1) and spec.kernel_size <= LARGEST and spec.border in ("zero", "renormalize")
    return regular and problem.channels_last and problem.element_size == 4 and target_bytes(problem) >= SMALLEST and has_room(problem)


def divide_program(channels: int) -> tuple[int, int]:
    """Return the rows and columns of groups of 2 x 4 pixels of a program, given its channels."""
    groups = SUMS_OF_THREAD * WARPS * WARP_SIZE // channels
    # at least as many columns of pixels as rows: L1 holds what a program reads in a step
    cols = 1 << (groups.bit_length() - 1) // 2
    return groups // cols, cols


def target_sum_launches(arguments: dict[str, Any], problem: TileProblem, window: Window, layout: Layout) -> list[Launch]:
    """Return the launches that fill dx; `arguments` are those of the operator, by name."""
    sums = divide_sums(problem)
    if problem.height * problem.width * problem.spec.taps * sums.step > INT32_MAX:
        layout = layout._replace(index=tl.int64)
    first = weigh_launch(arguments, problem, window, layout, sums, stores=False)
    groups_h, groups_w = divide_program(sums.block_c)
    programs = triton.cdiv(problem.height, ROWS * groups_h) * triton.cdiv(problem.width, COLS * groups_w)
    programs *= problem.batch * triton.cdiv(problem.channels, sums.block_c)
    given = {"sizes": arguments["sizes"], "weights_ptr": first.arguments["weights_ptr"], "dy": arguments["dy"], "dx": arguments["dx"]}
    constants = {"WINDOW": window, "LAYOUT": layout, "SUMS": sums, "GROUPS_H": groups_h, "GROUPS_W": groups_w}
    return [first, Launch(sum_targets, (programs, 1, 1), given, constants, WARPS, 1, MAX_REGISTERS)]
