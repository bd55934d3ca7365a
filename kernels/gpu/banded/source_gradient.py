"""The gradient to the features as a product with banded matrices, by programs that walk down a column of tiles.

A program visits tiles of cells one below the other. The targets d of a tile and of the columns around it read sources s that lie in a few
tiles of sources one below the other, the first of which begins half a window above the targets:

    dx[a] += dy B[a] [c, s],  B[a][d, s] = weight with which target d reads source s of tile a, rebuilt from its logit

After each step the first tile of sources is complete and is stored, and the others move up by one. Every row of the gradient of the output
is therefore read once, except for the first rows of a program, which complete the sources that begin above it. No atomics are needed,
because no two programs store the same sources.

The sources of a tile are few. With the channels as rows of the product, the matrix units of capability 9.0 and later multiply four warps at
a time and read both operands from shared memory themselves. Two tiles side by side are one product, for which they read dy once.
"""

import triton
import triton.language as tl

from ..common.blocks import add_product, align_sizes, align_strides, expand, image, join_blocks, load, product, split_block, store
from ..common.records import Features, Logits, Sizes
from ..common.window import centre, group_logits, lse_address, split_target, weight, window_offset


@triton.jit
def banded_source_gradient(
    sizes: Sizes,
    logits: Logits,  # [N, G * K * K, UP, UP, HQ, WQ]
    lse_ptr,  # [N, G, UP, UP, HQ, WQ]
    dy: Features,  # [N, G * C, HO, WO]
    dx: Features,  # [N, G * C, H, W]
    map_ptr,  # [N, H, W, WIDTH], whose product with the matrix is added to dx; None without one
    matrix_ptr,  # [WIDTH, G * C]
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    WALK: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TALL: tl.constexpr,  # whether channels are the rows of the product
):
    """Fill dx; one program computes a block of channels of TILE.steps tiles of sources, one below the other."""
    K: tl.constexpr = WINDOW.kernel_size
    UP: tl.constexpr = WINDOW.up
    AXIS: tl.constexpr = LAYOUT.x_axis
    S: tl.constexpr = WALK.s
    TILES: tl.constexpr = WALK.tiles
    # tiles of one product
    JOINED: tl.constexpr = 2 if TALL and TILES % 2 == 0 else 1
    # the axis of the targets in a band: neighbouring threads read neighbouring weights or logits
    ALONG: tl.constexpr = AXIS if TALL else 1
    BLOCK_C: tl.constexpr = TILE.block_c
    BLOCK_D: tl.constexpr = WALK.d
    sizes = align_sizes(sizes, LAYOUT)
    dx = align_strides(dx, AXIS, LAYOUT.x_align)
    dy = align_strides(dy, LAYOUT.y_axis, LAYOUT.y_align)
    tiles_w = tl.cdiv(sizes.w + K // 2, WALK.cols)
    walks = tl.cdiv(sizes.h + K // 2, TILE.steps * WALK.rows)
    pid = tl.program_id(0)
    parts = tl.cdiv(sizes.c, BLOCK_C)
    c0 = pid % parts * BLOCK_C
    c = tl.arange(0, BLOCK_C).to(LAYOUT.index)
    pid = pid // parts
    r0 = pid % tiles_w * TILE.cells_w
    first = pid // tiles_w % walks * TILE.steps
    ng = (pid // (tiles_w * walks)).to(tl.int64)
    n, g = ng // sizes.groups, ng % sizes.groups
    dx = image(dx, n, g * sizes.c + c0)
    dy = image(dy, n, g * sizes.c + c0)
    logits = group_logits(logits, n, g, WINDOW)
    lse_ptr += ng * UP * UP * sizes.hq * sizes.wq

    s = tl.arange(0, S).to(LAYOUT.index)
    si, j = s // WALK.cols, r0 * WINDOW.down - K // 2 + s % WALK.cols
    owned = (s < WALK.rows * WALK.cols) & (j >= 0) & (j < sizes.w)
    p = tl.arange(0, JOINED * S).to(LAYOUT.index)
    tile, p = p // S, p % S
    pi, pj = tile * WALK.rows + p // WALK.cols, r0 * WINDOW.down + p % WALK.cols
    # the steps before the first complete the sources that begin above it; no step is above or below the map
    start = tl.maximum(first - (TILES - 1), 0)
    stop = tl.minimum(first + TILE.steps, tl.cdiv(sizes.h + K // 2, WALK.rows))
    nothing = tl.zeros([BLOCK_C, S] if TALL else [S, BLOCK_C], tl.float32)
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles = tiles + (nothing,)
    for step in range(start, stop):
        blocks = tiles
        if JOINED == 2:
            blocks = ()
            for a in tl.static_range(0, TILES, 2):
                blocks = blocks + (join_blocks(tiles[a], tiles[a + 1]),)
        for d0 in range(0, WALK.height * WALK.width, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D).to(LAYOUT.index)
            di = d // WALK.width
            row, col = step * WALK.height + di, r0 * UP - WALK.lead + d % WALK.width
            reaching = (d < WALK.height * WALK.width) & (row < sizes.ho) & (col >= 0) & (col < sizes.wo)
            gradient = load(dy, row, col, reaching, c, sizes.c - c0, LAYOUT.y_axis, WALK.width, MOVES=True)
            if (LAYOUT.y_axis == 0) == TALL:
                gradient = tl.trans(gradient)
            col = tl.maximum(col, 0)
            lse = tl.zeros([BLOCK_D], tl.float32)
            if WINDOW.normalized:
                u, v, q, r = split_target(row, col, WINDOW)
                lse = tl.load(lse_address(lse_ptr, sizes, 0, u, v, q, r, WINDOW), mask=reaching, other=0.0)
            ky = expand(pi, 1 - ALONG) - expand(centre(di, WINDOW), ALONG)
            kx = expand(pj, 1 - ALONG) - expand(centre(col, WINDOW), ALONG)
            near = (kx.to(tl.uint32) < K) & expand(reaching, ALONG)
            offset = expand(window_offset(logits, row, col, WINDOW), ALONG) + (ky * K + kx) * logits.stride_c
            # the loads of all tiles are under way before the first product; a tile above the walk takes none
            read = ()
            bands = ()
            for a in tl.static_range(0, TILES, JOINED):
                band = near & ((ky + a * WALK.rows).to(tl.uint32) < K) & expand(step + a + tile >= first, 1 - ALONG)
                read = read + (tl.load(logits.ptr + (offset + a * WALK.rows * K * logits.stride_c), mask=band, other=0.0),)
                bands = bands + (band,)
            moved = ()
            for a in tl.static_range(TILES // JOINED):
                block = blocks[a]
                if JOINED == 2 or step + a >= first:
                    # an explicit zero keeps the compiler from computing the exponentials in every warp
                    b = tl.where(bands[a], weight(read[a].to(tl.float32), expand(lse, ALONG), WINDOW), 0.0).to(dy.ptr.dtype.element_ty)
                    if not TALL:
                        block += product(b, gradient, PRECISION)
                    elif ALONG == 0:
                        block += product(gradient, b, PRECISION)
                    else:
                        block += product(gradient, tl.trans(b), PRECISION)
                moved = moved + (block,)
            blocks = moved
        tiles = blocks
        if JOINED == 2:
            tiles = ()
            for a in tl.static_range(TILES // 2):
                tiles = tiles + split_block(blocks[a])
        i = step * WALK.rows - K // 2 + si
        complete = owned & (step >= first) & (i >= 0) & (i < sizes.h)
        block = tiles[0]
        if (AXIS == 0) == TALL:
            block = tl.trans(block)
        if WIDTH:
            matrix = matrix_ptr + (g * sizes.c + c0)
            block = add_product(block, map_ptr, matrix, n, i, j, complete, c, sizes.c - c0, sizes, WIDTH, PRECISION)
        store(dx, i, j, complete, c, sizes.c - c0, block, AXIS, WALK.cols, MOVES=True)
        moved = ()
        for a in tl.static_range(1, TILES):
            moved = moved + (tiles[a],)
        tiles = moved + (nothing,)
