"""The gradient to float32 features in NCHW of up 2 as a sum over the targets that read a pixel, and the launches of both scales of 2.

Four threads compute a block of 2 x 2 pixels of up 2. Each takes a quarter of the rows of targets that read the block, and adds each target
to all pixels that it reads. The threads then exchange their sums. The first two rows and the last two are read by one row of pixels only: a
thread takes one of these, and equally many of the others. This loads a third of the targets that one thread for each pixel would load. All
else is as in down 2 (cell_target_sums.py).
"""

from typing import Any

import triton
import triton.language as tl

from ..common.blocks import align_strides, find_tile, image, split_group
from ..common.records import Features, Layout, Logits, Sizes, Window
from ..common.vectors import advance, as_offset
from ..common.window import group_logits, lse_address, weight, widen_taps
from ..launch import Launch
from ..tiles.geometry import TileProblem, share_in_map
from ..tiles.time_model import find_device
from .cell_target_sums import Blocks, Share, load_lse, load_row, load_weight, sum_cell_targets
from .row_runs import LEAST_FILLED, align_cells, align_rows, find_row_alignment, larger_bytes
from .tap_sums import MAX_REGISTERS, WARP_SIZE, WARPS
from .taps import clamp

# bytes of the larger map from which the sums are taken: below it, they have too few programs for a device
SMALLEST = 2**24
# largest sides of windows whose weights fit into registers, up 2 and down 2
LARGEST_UP, LARGEST_DOWN = 5, 7
# fewest channels of a program, if its group has more
FEWEST = 16
# time that a program spends on weights, in channels
START = 10
# blocks of pixels in a row of a program of up 2: their threads are in one warp, and exchange sums without shared memory
COLS = 8
# cost of the place of a thread in a program, in targets read
PLACE = 12
# cost of each row of targets, in targets read, because rows do not begin and end with lines
LINE = 32
# programs that a multiprocessor holds
HELD = 4
# for the fewer weights of windows of down 2 up to 5 x 5
FEWER_REGISTERS = 96


@triton.jit
def load_pair(ptr, inside):
    """Return what lies at each address, that of an even cell, and in the next cell, with one instruction; zeros where not `inside`."""
    a, b = tl.split(tl.load(ptr[:, None] + tl.arange(0, 2)[None, :], mask=inside[:, None], other=0.0).to(tl.float32))
    return a, b


@triton.jit
def load_row_lse(lse_ptr, ng, u, q, left, exists, sizes: Sizes, WINDOW: tl.constexpr, PAIRS: tl.constexpr):
    """Return the log-sum-exp of the windows of cells of a row, ordered by sub-column and cell, or zero as in `load_lse`."""
    lse = ()
    for v in tl.static_range(2):
        for cell in tl.static_range(WINDOW.kernel_size + 1):
            r = left + cell
            if PAIRS and WINDOW.normalized:
                if cell % 2 == 0:
                    inside = exists & (q >= 0) & (q < sizes.hq) & (r >= 0) & (r < sizes.wq)
                    lse += load_pair(lse_address(lse_ptr, sizes, ng.to(tl.int64), u, v, q, r, WINDOW), inside)
            else:
                lse += (load_lse(lse_ptr, ng, u, v, q, r, exists, sizes, WINDOW),)
    return lse


@triton.jit
def weigh_pair(
    ptr, stride_w, lse, left, exists, sizes: Sizes, CELL: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr, PAIRS: tl.constexpr
):
    """Return the weights of a tap of two neighbouring cells of a row, CELL after `left`, in sub-column V; `ptr` is of column 0."""
    LSE: tl.constexpr = V * (WINDOW.kernel_size + 1) + CELL
    r = left + CELL
    ptr += r * stride_w
    if PAIRS and CELL % 2 == 0:
        inside = exists & (r >= 0) & (r < sizes.wq)
        a, b = load_pair(ptr, inside)
        return tl.where(inside, weight(a, lse[LSE], WINDOW), 0.0), tl.where(inside, weight(b, lse[LSE + 1], WINDOW), 0.0)
    else:
        # a size may cut off the last column of targets
        first = exists & (r >= 0) & (r < sizes.wq) & (2 * r + V < sizes.wo)
        second = exists & (r >= -1) & (r + 1 < sizes.wq) & (2 * r + 2 + V < sizes.wo)
        return load_weight(ptr, lse[LSE], first, WINDOW), load_weight(ptr + stride_w, lse[LSE + 1], second, WINDOW)


@triton.jit
def weigh_row(logits: Logits, lse_ptr, ng, row, i, left, exists, sizes: Sizes, WINDOW: tl.constexpr, PAIRS: tl.constexpr):
    """Return the weights of a row of targets for two neighbouring pixels of row i, ordered by tap, sub-column and pixel.

    The cells of the targets begin in column `left`. With PAIRS, it is even, and one instruction loads what belongs to two cells.
    """
    K: tl.constexpr = WINDOW.kernel_size
    # also of rows before the map, unlike a division, which rounds towards zero
    q, u = row >> 1, row & 1
    lse = load_row_lse(lse_ptr, ng, u, q, left, exists, sizes, WINDOW, PAIRS)
    weights = ()
    ptr = logits.ptr + ((i - q + K // 2) * K * logits.stride_c + u * logits.stride_u + q * logits.stride_h)
    exists &= (row >= 0) & (row < sizes.ho)
    for kx in tl.static_range(K):
        for v in tl.static_range(2):
            of_tap = ptr + (kx * logits.stride_c + v * logits.stride_v)
            weights += weigh_pair(of_tap, logits.stride_w, lse, left, exists, sizes, K - 1 - kx, v, WINDOW, PAIRS)
    return weights


@triton.jit
def add_row(s0, s1, targets, weights, FIRST: tl.constexpr, K: tl.constexpr):
    """Add a row of targets to the sums of two neighbouring pixels, with the weights from FIRST on."""
    for kx in tl.static_range(K):
        for v in tl.static_range(2):
            s0 += weights[FIRST + 4 * kx + 2 * v] * targets[2 * (K - 1 - kx) + v]
            s1 += weights[FIRST + 4 * kx + 2 * v + 1] * targets[2 * (K - kx) + v]
    return s0, s1


@triton.jit
def exchange(values, DISTANCE: tl.constexpr, PERIOD: tl.constexpr):
    """Return the value of the thread at a distance, a power of two, in each run of PERIOD threads."""
    block = tl.reshape(values, (values.shape[0] // PERIOD, PERIOD))
    index = tl.broadcast_to((tl.arange(0, PERIOD) ^ DISTANCE)[None, :], block.shape)
    return tl.reshape(tl.gather(block, index, 1), values.shape)


@triton.jit
def sum_block_targets(
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
    """Fill dx; one program computes a share of the channels of a rectangle of blocks of 2 x 2 pixels."""
    K: tl.constexpr = WINDOW.kernel_size
    RADIUS: tl.constexpr = K // 2
    ROWS: tl.constexpr = BLOCKS.rows
    COLS: tl.constexpr = BLOCKS.cols
    VECTOR: tl.constexpr = BLOCKS.vector
    # vectors of four targets begin at even cells, and blocks of windows of 3 x 3 therefore at odd ones
    SHIFT: tl.constexpr = RADIUS % 2 if VECTOR == 4 else 0
    PAIRS: tl.constexpr = VECTOR == 4 and BLOCKS.align == 2
    sizes = align_cells(sizes, BLOCKS.align)
    logits = align_rows(logits, BLOCKS.align)
    dy = align_strides(dy, 1, LAYOUT.y_align)
    pid = tl.program_id(0)
    first = pid % share.programs * share.channels
    last = tl.minimum(sizes.c, first + share.channels)
    i0, j0, ng = find_tile(pid // share.programs, tl.cdiv(sizes.h, 2 * ROWS), tl.cdiv(sizes.w + SHIFT, 2 * COLS))
    n, g = split_group(ng, sizes)
    m = tl.arange(0, 4 * ROWS * COLS).to(LAYOUT.index)
    quarter = m // COLS % 4
    i, left = (i0 * ROWS + m // (4 * COLS)) * 2, (j0 * COLS + m % COLS) * 2 - (SHIFT + RADIUS)
    j = left + RADIUS
    exists = (i < sizes.h) & (j < sizes.w)

    # of the pixels that read the first row of targets of a thread, and of the others of the block
    own, other = i + quarter // 2, i + 1 - quarter // 2
    logits = widen_taps(group_logits(logits, n, g, WINDOW), LAYOUT)
    row = 2 * i + quarter + tl.where(quarter < 2, -2 * RADIUS, 2 * RADIUS)
    single = weigh_row(logits, lse_ptr, ng, row, own, left, exists, sizes, WINDOW, PAIRS)
    rows = (clamp(row, 0, sizes.ho - 1) * dy.stride_h,)
    near, far = (), ()
    for k in tl.static_range(RADIUS):
        row = 2 * (i - RADIUS + 1 + 2 * k) + quarter
        near += weigh_row(logits, lse_ptr, ng, row, own, left, exists, sizes, WINDOW, PAIRS)
        far += weigh_row(logits, lse_ptr, ng, row, other, left, exists, sizes, WINDOW, PAIRS)
        rows += (clamp(row, 0, sizes.ho - 1) * dy.stride_h,)
    cols = ()
    for k in tl.static_range((2 * K + 2) // VECTOR):
        cols += (clamp(left * 2 // VECTOR + k, 0, sizes.wo // VECTOR - 1) * VECTOR * dy.stride_w,)

    dy = image(dy, n, g * sizes.c)
    dx = image(dx, n, g * sizes.c)
    i, j = own, j + quarter % 2
    exists = (i < sizes.h) & (j >= 0) & (j < sizes.w)
    # a column costs no instruction; offsets of rows change, so that no sums of both wait in registers
    rows = advance(rows, cols[(K + 1) // VECTOR] + first.to(LAYOUT.index) * dy.stride_c)
    cols = advance(cols, -cols[(K + 1) // VECTOR])
    to = i * dx.stride_h + j * dx.stride_w + first.to(LAYOUT.index) * dx.stride_c
    for _ in range(first, last):
        zero = tl.zeros(exists.shape, tl.float32)
        targets = load_row(dy.ptr, rows[0], cols, VECTOR)
        own0, own1 = add_row(zero, zero, targets, single, 0, K)
        other0, other1 = zero, zero
        for k in tl.static_range(RADIUS):
            targets = load_row(dy.ptr, rows[1 + k], cols, VECTOR)
            own0, own1 = add_row(own0, own1, targets, near, k * 4 * K, K)
            other0, other1 = add_row(other0, other1, targets, far, k * 4 * K, K)
        own0 += exchange(other0, 2 * COLS, 4 * COLS)
        own1 += exchange(other1, 2 * COLS, 4 * COLS)
        kept, given = tl.where(quarter % 2 == 0, own0, own1), tl.where(quarter % 2 == 0, own1, own0)
        tl.store(dx.ptr + as_offset(to), (kept + exchange(given, COLS, 4 * COLS)).to(dx.ptr.dtype.element_ty), mask=exists)
        rows = advance(rows, dy.stride_c)
        to += dx.stride_c


def sums_row_targets(problem: TileProblem) -> bool:
    """Return whether the gradient to the features sums over targets in rows of pixels, and has no tile."""
    # with Triton 3.4 as well, because no sum is carried from one channel to the next
    spec = problem.spec
    if problem.channels_last or spec.border not in ("zero", "renormalize"):
        return False
    if larger_bytes(problem) < SMALLEST:
        return False
    if (spec.up, spec.down) == (2, 1):
        filled = share_in_map(problem, 2, 2 * COLS) >= LEAST_FILLED
        return filled and problem.element_size == 4 and 3 <= spec.kernel_size <= LARGEST_UP
    return (spec.up, spec.down) == (1, 2) and spec.kernel_size <= LARGEST_DOWN


def row_target_sum_launches(arguments: dict[str, Any], problem: TileProblem, window: Window, layout: Layout) -> list[Launch]:
    """Return the launch that fills dx; `arguments` are those of the operator, by name."""
    spec, radius = problem.spec, problem.spec.kernel_size // 2
    if spec.up == 2:
        kernel, height, threads, vector = sum_block_targets, 2, 4, min(4, layout.y_align)
        shapes = [(rows, COLS) for rows in (8, 4, 2, 1)]
        align = find_row_alignment(problem, (arguments["logits"],))
    else:
        align = 1
        kernel, height, threads, vector = sum_cell_targets, 1, 1, min(2, layout.y_align)
        shapes = [(WARPS * WARP_SIZE // cols, cols) for cols in (32, 16, 8, 4)]
    # blocks may begin a column before the map
    width = problem.width + (radius % 2 if vector == 4 else 0)

    def count(rows: int, cols: int) -> int:
        """Return the programs for all channels."""
        return problem.batch * triton.cdiv(problem.height, height * rows) * triton.cdiv(width, 2 * cols)

    def cost(shape: tuple[int, int]) -> int:
        """Return the targets that all programs read, and the places of threads."""
        rows, cols = shape
        around = 2 * radius * spec.up // spec.down
        read = (rows * height * spec.up + around) * (cols * 2 * spec.up + around + LINE)
        return count(rows, cols) * (read + PLACE * rows * cols * threads)

    rows, cols = min(shapes, key=cost)
    warps = rows * cols * threads // WARP_SIZE
    wave = find_device(problem.capability).multiprocessors * HELD * WARPS // warps
    # programs take equally long, so that the last wave should be full
    split = min(
        range(1, problem.channels // FEWEST + 1),
        key=lambda split: triton.cdiv(count(rows, cols) * split, wave) * (START + triton.cdiv(problem.channels, split)),
        default=1,
    )
    registers = MAX_REGISTERS if spec.up == 2 or spec.kernel_size > 5 else FEWER_REGISTERS
    given = {name: arguments[name] for name in ("sizes", "logits", "lse_ptr", "dy", "dx")}
    given |= {"share": Share(split, triton.cdiv(problem.channels, split))}
    constants = {"WINDOW": window, "LAYOUT": layout, "BLOCKS": Blocks(rows, cols, vector, align)}
    return [Launch(kernel, (count(rows, cols) * split, 1, 1), given, constants, warps, 1, registers)]
