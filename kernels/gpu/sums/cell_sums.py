"""The gradient to float32 features in channels_last of down 2 as a sum over the targets that read a pixel.

    dx[p] = sum_t sum_{targets m: window(m) + t = p} w[m, t] dy[m]

A thread computes the 2 x 4 pixels of two neighbouring cells in four channels. It loads each of the targets that read them once, and keeps
the sums in registers. A weight is that of a single pixel: threads compute those of their pixels, and no launch stores them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.blocks import align_sizes, align_strides, find_tile, image, split_group
from ..common.records import Features, Layout, Logits, Sizes, Window
from ..common.window import group_logits, widen_taps
from ..launch import Launch
from ..tiles.geometry import TileProblem, power_of_two, source_bytes
from .cell_target_sums import load_lse, load_weight
from .tap_sums import CHANNELS, MAX_REGISTERS
from .target_sums import WARPS, divide_program, load_target, store_pixels

# bytes of the features from which the sums are taken: below it, they have too few programs for a device
SMALLEST = 2**26
# largest side of a window: every target that reads a pixel is code of its own, and larger windows spill
LARGEST = 5


class Pairs(NamedTuple):
    """The pairs of neighbouring cells of a program. A constant."""

    rows: int
    cols: int
    block_c: int  # channels of a program
    whole: bool  # whether all programs have that many channels


@triton.jit
def add_targets(s, g, ptr, stride_c, lse, exists, KY: tl.constexpr, KX: tl.constexpr, WINDOW: tl.constexpr):
    """Add targets to the sums of pixels, with their logits of tap (KY, KX), if there is such a tap."""
    K: tl.constexpr = WINDOW.kernel_size
    if KY >= 0 and KY < K and KX >= 0 and KX < K:
        s += load_weight(ptr + (KY * K + KX) * stride_c, lse, exists, WINDOW)[:, None] * g
    return s


@triton.jit
def sum_cells(
    sizes: Sizes,
    logits: Logits,  # [N, G * K * K, 1, 1, HQ, WQ]
    lse_ptr,  # [N, G, 1, 1, HQ, WQ]
    dy: Features,  # [N, G * C, HO, WO]
    dx: Features,  # [N, G * C, H, W]
    WINDOW: tl.constexpr,
    LAYOUT: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Fill dx; one program computes a block of channels of a rectangle of pairs of cells."""
    RADIUS: tl.constexpr = WINDOW.kernel_size // 2
    COLS: tl.constexpr = PAIRS.cols
    BLOCK_C: tl.constexpr = PAIRS.block_c
    # rows and columns of targets before the first cell of a pair
    BEFORE: tl.constexpr = RADIUS // 2
    sizes = align_sizes(sizes, LAYOUT)
    dy = align_strides(dy, 0, LAYOUT.y_align)
    dx = align_strides(dx, 0, LAYOUT.x_align)
    pid = tl.program_id(0)
    parts = tl.cdiv(sizes.c, BLOCK_C)
    c = pid % parts * BLOCK_C + tl.arange(0, BLOCK_C).to(LAYOUT.index)
    q0, r0, ng = find_tile(pid // parts, tl.cdiv(sizes.hq, PAIRS.rows), tl.cdiv(sizes.wq, 2 * COLS))
    n, g = split_group(ng, sizes)
    m = tl.arange(0, PAIRS.rows * COLS).to(LAYOUT.index)
    q, r = q0 * PAIRS.rows + m // COLS, (r0 * COLS + m % COLS) * 2
    logits = widen_taps(group_logits(logits, n, g, WINDOW), LAYOUT)
    dy = image(dy, n, g * sizes.c)
    dx = image(dx, n, g * sizes.c)

    sums = (tl.zeros([PAIRS.rows * COLS, BLOCK_C], tl.float32),) * 8
    for k in tl.static_range(RADIUS + 1):
        row = q + (k - BEFORE)
        for b in tl.static_range(RADIUS + 2):
            col = r + (b - BEFORE)
            exists = (row >= 0) & (row < sizes.hq) & (col >= 0) & (col < sizes.wq)
            targets = load_target(dy, tl.maximum(row, 0), tl.maximum(col, 0), c, sizes, PAIRS)
            lse = load_lse(lse_ptr, ng, 0, 0, row, col, exists, sizes, WINDOW)
            ptr = logits.ptr + (row * logits.stride_h + col * logits.stride_w)
            moved = ()
            for p in tl.static_range(8):
                ky, kx = p // 4 + RADIUS + 2 * (BEFORE - k), p % 4 + RADIUS + 2 * (BEFORE - b)
                moved += (add_targets(sums[p], targets, ptr, logits.stride_c, lse, exists, ky, kx, WINDOW),)
            sums = moved
    store_pixels(dx, q * 2, r * 2, c, sums[0], sums[1], sums[2], sums[3], sizes)
    store_pixels(dx, q * 2 + 1, r * 2, c, sums[4], sums[5], sums[6], sums[7], sizes)


def sums_cells(problem: TileProblem) -> bool:
    """Return whether the gradient to the features sums over the targets of cells, and has no tile."""
    spec = problem.spec
    regular = (spec.up, spec.down) == (1, 2) and spec.kernel_size <= LARGEST and spec.border in ("zero", "renormalize")
    return regular and problem.channels_last and problem.element_size == 4 and source_bytes(problem) >= SMALLEST


def cell_sum_launches(arguments: dict[str, Any], problem: TileProblem, window: Window, layout: Layout) -> list[Launch]:
    """Return the launch that fills dx; `arguments` are those of the operator, by name."""
    block_c = min(CHANNELS, power_of_two(problem.channels))
    rows, cols = divide_program(block_c)
    programs = triton.cdiv(problem.height, rows) * triton.cdiv(problem.width, 2 * cols)
    programs *= problem.batch * triton.cdiv(problem.channels, block_c)
    given = {name: arguments[name] for name in ("sizes", "logits", "lse_ptr", "dy", "dx")}
    constants = {"WINDOW": window, "LAYOUT": layout, "PAIRS": Pairs(rows, cols, block_c, problem.channels % block_c == 0)}
    return [Launch(sum_cells, (programs, 1, 1), given, constants, WARPS, 1, MAX_REGISTERS)]
