"""The gradient to the features in NCHW as a sum over the targets that read a pixel: up 2 in float32, and down 2.

    dx[p] = sum_t sum_{targets m: window(m) + t = p} w[m, t] dy[m]

Weights stay in the registers of a thread, which are computed once for all channels of a program. Neighbouring threads compute neighbouring
pixels, so that a warp reads and writes rows of pixels. Neither shared memory nor matrix units are needed, and no thread waits for another
one.

*up 2.* Four threads compute a block of 2 x 2 pixels. Each takes a quarter of the rows of targets that read the block, and adds each target
to all pixels that it reads. The threads then exchange their sums. The first two rows and the last two are read by one row of pixels only: a
thread takes one of these, and equally many of the others.

*down 2.* A thread computes the 2 x 4 pixels of two neighbouring cells, and loads each of the targets that read them once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import align_sizes, align_strides, find_tile, image, split_group
from .launch import Launch
from .records import Features, Layout, Logits, Sizes, Window
from .tap_sums import MAX_REGISTERS, WARP_SIZE, WARPS, target_bytes
from .taps import clamp
from .tile_geometry import TileProblem, source_bytes
from .tile_time import find_device
from .window import group_logits, lse_address, weight

# bytes of the larger map from which the sums are taken: below it, they have too few programs for a device
SMALLEST = 2**22
# largest sides of windows whose weights fit into registers, up 2 and down 2
LARGEST_UP, LARGEST_DOWN = 5, 7
# fewest channels of a group, and of a program: below them, a program spends most of its time on weights
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


class Blocks(NamedTuple):
    """The blocks of pixels of a program. A constant."""

    rows: int
    cols: int
    vector: int  # targets of one load


class Share(NamedTuple):
    """The division of the channels of a group among programs."""

    programs: int
    channels: int  # of each program


@triton.jit
def as_offset(values):
    """Return offsets that are not negative in the type that takes the fewest instructions to add to a pointer."""
    if values.dtype == tl.int64:
        return values
    else:
        return values.to(tl.uint32)


@triton.jit
def load_vector(ptr, VECTOR: tl.constexpr):
    """Return the VECTOR neighbours that begin at each address, in float32."""
    if VECTOR == 1:
        return (tl.load(ptr).to(tl.float32),)
    elif VECTOR == 2:
        a, b = tl.split(tl.load(ptr[:, None] + tl.arange(0, 2)[None, :]).to(tl.float32))
        return a, b
    else:
        block = tl.load(ptr[:, None] + tl.arange(0, 4)[None, :]).to(tl.float32)
        even, odd = tl.split(tl.reshape(block, (block.shape[0], 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d


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
def weigh_row(logits: Logits, lse_ptr, ng, row, i, j, exists, sizes: Sizes, WINDOW: tl.constexpr):
    """Return the weights of a row of targets of up 2 for the pixels (i, j) and (i, j + 1), ordered by pixel, tap and column of a cell."""
    K: tl.constexpr = WINDOW.kernel_size
    # also of rows before the map, unlike a division, which rounds towards zero
    q, u = row >> 1, row & 1
    lse = ()
    for col in tl.static_range(2 * K + 2):
        lse = lse + (load_lse(lse_ptr, ng, u, col % 2, q, j - K // 2 + col // 2, exists, sizes, WINDOW),)
    weights = ()
    ptr = logits.ptr + ((i - q + K // 2) * K * logits.stride_c + u * logits.stride_u + q * logits.stride_h)
    exists &= (row >= 0) & (row < sizes.ho)
    for pixel in tl.static_range(2):
        for kx in tl.static_range(K):
            r = j + (pixel + K // 2 - kx)
            inside = exists & (r >= 0) & (r < sizes.w)
            for v in tl.static_range(2):
                address = ptr + (kx * logits.stride_c + v * logits.stride_v + r * logits.stride_w)
                weights = weights + (load_weight(address, lse[2 * (pixel + K - 1 - kx) + v], inside, WINDOW),)
    return weights


@triton.jit
def add_row(s0, s1, targets, weights, FIRST: tl.constexpr, K: tl.constexpr):
    """Add a row of targets of up 2 to the sums of two neighbouring pixels, with the weights from FIRST on."""
    for kx in tl.static_range(K):
        for v in tl.static_range(2):
            s0 += weights[FIRST + 2 * kx + v] * targets[2 * (K - 1 - kx) + v]
            s1 += weights[FIRST + 2 * (K + kx) + v] * targets[2 * (K - kx) + v]
    return s0, s1


@triton.jit
def load_row(ptr, row, cols, VECTOR: tl.constexpr):
    """Return a row of targets, a vector at each of the offsets `cols` from `row`."""
    targets = ()
    for k in tl.static_range(len(cols)):
        targets = targets + load_vector(ptr + as_offset(row + cols[k]), VECTOR)
    return targets


@triton.jit
def advance(offsets, step):
    """Return the same offsets in another channel."""
    moved = ()
    for k in tl.static_range(len(offsets)):
        moved = moved + (offsets[k] + step,)
    return moved


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
    """Fill dx of up 2; one program computes a share of the channels of a rectangle of blocks of 2 x 2 pixels."""
    K: tl.constexpr = WINDOW.kernel_size
    RADIUS: tl.constexpr = K // 2
    ROWS: tl.constexpr = BLOCKS.rows
    COLS: tl.constexpr = BLOCKS.cols
    VECTOR: tl.constexpr = BLOCKS.vector
    # vectors of four targets begin at even cells, and blocks of windows of 3 x 3 therefore at odd ones
    SHIFT: tl.constexpr = RADIUS % 2 if VECTOR == 4 else 0
    dy = align_strides(dy, 1, LAYOUT.y_align)
    pid = tl.program_id(0)
    first = pid % share.programs * share.channels
    last = tl.minimum(sizes.c, first + share.channels)
    i0, j0, ng = find_tile(pid // share.programs, tl.cdiv(sizes.h, 2 * ROWS), tl.cdiv(sizes.w + SHIFT, 2 * COLS))
    n, g = split_group(ng, sizes)
    m = tl.arange(0, 4 * ROWS * COLS).to(LAYOUT.index)
    quarter = m // COLS % 4
    i, j = (i0 * ROWS + m // (4 * COLS)) * 2, (j0 * COLS + m % COLS) * 2 - SHIFT
    exists = (i < sizes.h) & (j < sizes.w)

    # of the pixels that read the first row of targets of a thread, and of the others of the block
    own, other = i + quarter // 2, i + 1 - quarter // 2
    logits = group_logits(logits, n, g, WINDOW)
    row = 2 * i + quarter + tl.where(quarter < 2, -2 * RADIUS, 2 * RADIUS)
    single = weigh_row(logits, lse_ptr, ng, row, own, j, exists, sizes, WINDOW)
    rows = (clamp(row, 0, sizes.ho - 1) * dy.stride_h,)
    near, far = (), ()
    for k in tl.static_range(RADIUS):
        row = 2 * (i - RADIUS + 1 + 2 * k) + quarter
        near = near + weigh_row(logits, lse_ptr, ng, row, own, j, exists, sizes, WINDOW)
        far = far + weigh_row(logits, lse_ptr, ng, row, other, j, exists, sizes, WINDOW)
        rows = rows + (clamp(row, 0, sizes.ho - 1) * dy.stride_h,)
    cols = ()
    for k in tl.static_range((2 * K + 2) // VECTOR):
        cols = cols + (clamp((j - RADIUS) * 2 // VECTOR + k, 0, sizes.wo // VECTOR - 1) * VECTOR * dy.stride_w,)

    dy = image(dy, n, g * sizes.c)
    dx = image(dx, n, g * sizes.c)
    i, j = own, j + quarter % 2
    exists = (i < sizes.h) & (j >= 0) & (j < sizes.w)
    # offsets that change are not added to those of the columns before the loop, where the sums would take more registers
    rows = advance(rows, first.to(LAYOUT.index) * dy.stride_c)
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


@triton.jit
def weigh_tap(logits: Logits, lse, q, r, KY: tl.constexpr, KX: tl.constexpr, exists, sizes: Sizes, WINDOW: tl.constexpr):
    """Return the weights by which targets of down 2 read pixels of the cells (q, r) with one tap."""
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
    """Return the weights of down 2 by which targets read the pixels of the cells (q, r), ordered by taps."""
    K: tl.constexpr = WINDOW.kernel_size
    SPAN: tl.constexpr = K // 2 + 1
    lse = ()
    for k in tl.static_range(SPAN * SPAN):
        lse = lse + (load_lse(lse_ptr, ng, 0, 0, q + (k // SPAN - K // 4), r + (k % SPAN - K // 4), exists, sizes, WINDOW),)
    weights = ()
    for t in tl.static_range(K * K):
        weights = weights + (weigh_tap(logits, lse, q, r, t // K, t % K, exists, sizes, WINDOW),)
    return weights


@triton.jit
def add_targets(s, targets, weights, KY: tl.constexpr, X: tl.constexpr, CELL: tl.constexpr, WINDOW: tl.constexpr):
    """Add a row of targets of down 2 to the sums of pixels in column X of their cell, and in row KY of the windows of the targets."""
    K: tl.constexpr = WINDOW.kernel_size
    RADIUS: tl.constexpr = K // 2
    if KY >= 0 and KY < K:
        for b in tl.static_range(RADIUS + 1):
            if X + RADIUS + 2 * (RADIUS // 2 - b) >= 0 and X + RADIUS + 2 * (RADIUS // 2 - b) < K:
                s += weights[(CELL * K + KY) * K + X + RADIUS + 2 * (RADIUS // 2 - b)] * targets[CELL + b]
    return s


@triton.jit
def join4(s0, s1, s2, s3):
    """Return a block [M, 4] of four columns."""
    return tl.reshape(tl.join(tl.join(s0, s2), tl.join(s1, s3)), (s0.shape[0], 4))


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
    """Fill dx of down 2; one program computes a share of the channels of a rectangle of blocks of 2 x 4 pixels."""
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
    logits = group_logits(logits, n, g, WINDOW)
    weights = weigh_cell(logits, lse_ptr, ng, q, r, exists, sizes, WINDOW)
    weights = weights + weigh_cell(logits, lse_ptr, ng, q, r + 1, exists, sizes, WINDOW)

    dy = image(dy, n, g * sizes.c)
    dx = image(dx, n, g * sizes.c)
    start = first.to(LAYOUT.index)
    rows, cols = (), ()
    for k in tl.static_range(RADIUS + 1):
        rows = rows + (clamp(q + (k - BEFORE), 0, sizes.hq - 1) * dy.stride_h + start * dy.stride_c,)
    for k in tl.static_range(RADIUS + 2):
        if k < BEFORE or k >= BEFORE + PAIRED:
            cols = cols + (clamp(r + (k - BEFORE), 0, sizes.wq - 1) * dy.stride_w,)
        elif (k - BEFORE) % VECTOR == 0:
            cols = cols + (clamp((r + (k - BEFORE)) // VECTOR, 0, sizes.wq // VECTOR - 1) * VECTOR * dy.stride_w,)
    place = tl.arange(0, 4).to(LAYOUT.index)[None, :]
    there = (r * 2)[:, None] + place < sizes.w
    to = (q * 2 * dx.stride_h + start * dx.stride_c)[:, None] + ((r * 2)[:, None] + place) * dx.stride_w
    upper, lower = there & (q * 2 < sizes.h)[:, None], there & (q * 2 + 1 < sizes.h)[:, None]
    for _ in range(first, last):
        sums = (tl.zeros(q.shape, tl.float32),) * 8
        for k in tl.static_range(RADIUS + 1):
            targets = load_row(dy.ptr, rows[k], cols[:BEFORE], 1)
            targets = targets + load_row(dy.ptr, rows[k], cols[BEFORE : BEFORE + PAIRED // VECTOR], VECTOR)
            targets = targets + load_row(dy.ptr, rows[k], cols[BEFORE + PAIRED // VECTOR :], 1)
            moved = ()
            for p in tl.static_range(8):
                moved = moved + (add_targets(sums[p], targets, weights, p // 4 + RADIUS + 2 * (RADIUS // 2 - k), p % 2, p // 2 % 2, WINDOW),)
            sums = moved
        tl.store(dx.ptr + as_offset(to), join4(sums[0], sums[1], sums[2], sums[3]).to(dx.ptr.dtype.element_ty), mask=upper)
        tl.store(dx.ptr + as_offset(to + dx.stride_h), join4(sums[4], sums[5], sums[6], sums[7]).to(dx.ptr.dtype.element_ty), mask=lower)
        rows = advance(rows, dy.stride_c)
        to += dx.stride_c


def sums_row_targets(problem: TileProblem) -> bool:
    """Return whether the gradient to the features sums over targets in rows of pixels, and has no tile."""
    spec = problem.spec
    if problem.channels_last or spec.border not in ("zero", "renormalize") or problem.channels < FEWEST:
        return False
    if max(target_bytes(problem), source_bytes(problem)) < SMALLEST:
        return False
    if (spec.up, spec.down) == (2, 1):
        return problem.element_size == 4 and 3 <= spec.kernel_size <= LARGEST_UP
    return (spec.up, spec.down) == (1, 2) and spec.kernel_size <= LARGEST_DOWN


def row_target_sum_launches(arguments: dict[str, Any], problem: TileProblem, window: Window, layout: Layout) -> list[Launch]:
    """Return the launch that fills dx; `arguments` are those of the operator, by name."""
    spec, radius = problem.spec, problem.spec.kernel_size // 2
    if spec.up == 2:
        kernel, height, threads, vector = sum_block_targets, 2, 4, min(4, layout.y_align)
        shapes = [(rows, COLS) for rows in (4, 2, 1)]
    else:
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
    given = {name: arguments[name] for name in ("sizes", "logits", "lse_ptr", "dy", "dx")}
    given |= {"share": Share(split, triton.cdiv(problem.channels, split))}
    constants = {"WINDOW": window, "LAYOUT": layout, "BLOCKS": Blocks(rows, cols, vector)}
    return [Launch(kernel, (count(rows, cols) * split, 1, 1), given, constants, warps, 1, MAX_REGISTERS)]
