"""Blocks of features for matrix products: addresses, loads, products and stores.

A block is [locations, channels] if channels are the fastest axis of the features, and [channels, locations] otherwise. AXIS is the axis of
the locations.
"""

import triton
import triton.language as tl

from .records import Features, Sizes

LAYS_WARPS_ALONG_CHANNELS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


@triton.jit
def expand(values, AXIS: tl.constexpr):
    """Lay a vector along axis AXIS of a two-dimensional block."""
    return tl.expand_dims(values, 1 - AXIS)


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """Tell the compiler that `value` is a multiple of ALIGN, which the host has checked."""
    if ALIGN == 1:
        return value
    else:
        # without the sign, one instruction
        unsigned = value.to(tl.uint64 if value.dtype == tl.int64 else tl.uint32)
        return (unsigned // ALIGN * ALIGN).to(value.dtype)


@triton.jit
def align_strides(features: Features, AXIS: tl.constexpr, ALIGN: tl.constexpr):
    """Tell the compiler that every stride is a multiple of ALIGN, except the stride of the fastest axis."""
    stride_n, stride_h = aligned(features.stride_n, ALIGN), aligned(features.stride_h, ALIGN)
    if AXIS == 0:
        return Features(features.ptr, stride_n, features.stride_c, stride_h, aligned(features.stride_w, ALIGN))
    else:
        return Features(features.ptr, stride_n, aligned(features.stride_c, ALIGN), stride_h, features.stride_w)


@triton.jit
def align_sizes(sizes: Sizes, LAYOUT: tl.constexpr):
    """Tell the compiler that every run along the fastest axis of the features ends at a multiple of their alignment."""
    c, w, wo = sizes.c, sizes.w, sizes.wo
    if LAYOUT.x_axis == 0:
        c = aligned(c, LAYOUT.x_align)
    else:
        w = aligned(w, LAYOUT.x_align)
        if LAYOUT.y_axis == 0:
            c = aligned(c, LAYOUT.y_align)
    if LAYOUT.y_axis == 1:
        wo = aligned(wo, LAYOUT.y_align)
    return Sizes(sizes.groups, c, sizes.h, w, sizes.ho, wo, sizes.hq, sizes.wq)


@triton.jit
def find_tile(pid, tiles_h, tiles_w):
    """Return the row and the column of tile `pid` of a map, counted over all maps, and the index of the map."""
    # one division for each axis, because each takes 16 instructions, and 25 with signs
    above = (pid.to(tl.uint32) // tiles_w.to(tl.uint32)).to(tl.int32)
    n = (above.to(tl.uint32) // tiles_h.to(tl.uint32)).to(tl.int32)
    return above - n * tiles_h, pid - above * tiles_w, n


@triton.jit
def split_group(ng, sizes: Sizes):
    """Return the image and the group of a group counted over all images, in the type of offsets between images."""
    # before the conversion, because the division of 64-bit integers is slow
    n = ng // sizes.groups
    return n.to(tl.int64), (ng - n * sizes.groups).to(tl.int64)


@triton.jit
def image(features: Features, n, c):
    """Return image n of the features, from channel c on."""
    ptr = features.ptr + (n * features.stride_n + c * features.stride_c)
    return Features(ptr, features.stride_n, features.stride_c, features.stride_h, features.stride_w)


@triton.jit
def place_sources(p, HALO: tl.constexpr, LAYOUT: tl.constexpr):
    """Return the rows and columns of sources p in their halo."""
    WIDTH: tl.constexpr = HALO.width
    if LAYOUT.x_axis == 1 or WIDTH & (WIDTH - 1) == 0 or HALO.p * WIDTH > 1 << 16:
        return p // WIDTH, p % WIDTH
    else:
        # three instructions in place of eight; it exceeds p / WIDTH by less than 1 / WIDTH, and the compiler would not find rows of pixels
        i = p * ((1 << 16) // WIDTH + 1) >> 16
        return i, p - i * WIDTH


@triton.jit
def is_inside(i, j, sizes: Sizes):
    """Return whether source locations lie in the map."""
    # as unsigned numbers, those before the map lie beyond it
    unsigned = tl.uint64 if i.dtype == tl.int64 else tl.uint32
    return (i.to(unsigned) < sizes.h.to(unsigned)) & (j.to(unsigned) < sizes.w.to(unsigned))


@triton.jit
def along_rows(ptr, offset):
    """Return the addresses ptr + offset [channels or taps, locations] in NCHW, where a warp should access a row of locations.

    Where no addresses look contiguous, Triton up to 3.6 lays the threads of a warp along the first axis, each in its own line of memory.
    There, addresses that are not contiguous are said to be, and the divisibility keeps that compiler from accessing two as one. It does not
    keep Triton 3.9 from it, and Triton from 3.7 on needs no such hint.
    """
    if LAYS_WARPS_ALONG_CHANNELS:
        return tl.max_contiguous(tl.multiple_of(ptr + offset, [1, 1]), [1, 2])
    else:
        return ptr + offset


@triton.jit
def addresses(features: Features, row, col, c, AXIS: tl.constexpr, WIDTH: tl.constexpr, MOVES: tl.constexpr = False):
    """Return the addresses of channels c at locations (row, col), WIDTH of them in a row, which change in the innermost loop if MOVES."""
    locations = expand(row * features.stride_h + col * features.stride_w, AXIS)
    channels = expand(c * features.stride_c, 1 - AXIS)
    # rows of an even width look contiguous
    if AXIS == 1 and WIDTH % 2 == 1:
        return along_rows(features.ptr + locations, channels)
    elif MOVES:
        # what the loop does not change are offsets, which take half the registers of addresses
        return features.ptr + (locations + channels)
    else:
        return features.ptr + locations + channels


@triton.jit
def load(features: Features, row, col, exists, c, channels, AXIS: tl.constexpr, WIDTH: tl.constexpr, MOVES: tl.constexpr = False):
    """Return channels c at locations (row, col); zero where the location does not exist or c is not below `channels`."""
    mask = expand(exists, AXIS) & expand(c < channels, 1 - AXIS)
    return tl.load(addresses(features, row, col, c, AXIS, WIDTH, MOVES), mask=mask, other=0.0)


@triton.jit
def store(features: Features, row, col, exists, c, channels, block, AXIS: tl.constexpr, WIDTH: tl.constexpr, MOVES: tl.constexpr = False):
    """Store channels c at locations (row, col), except where the location does not exist or c is not below `channels`."""
    mask = expand(exists, AXIS) & expand(c < channels, 1 - AXIS)
    tl.store(addresses(features, row, col, c, AXIS, WIDTH, MOVES), block.to(features.ptr.dtype.element_ty), mask=mask)


@triton.jit
def join_blocks(left, right):
    """Lay two blocks of one shape side by side."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], 2 * left.shape[1]))


@triton.jit
def split_block(block):
    """Return the left and the right half of a block."""
    return tl.split(tl.permute(tl.reshape(block, (block.shape[0], 2, block.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def add_product(block, map_ptr, matrix_ptr, n, row, col, exists, c, channels, sizes: Sizes, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Add the product of a map [N, H, W, WIDTH] and a matrix [WIDTH, G * C] to a block [locations, channels c] of features.

    `map_ptr` is that of image 0, and `matrix_ptr` that of the channels of the group.
    """
    K: tl.constexpr = 16 if WIDTH <= 16 else 32 if WIDTH <= 32 else 64
    pixels = map_ptr + n * sizes.h * sizes.w * WIDTH + (row * sizes.w + col)[:, None] * WIDTH
    for start in range(0, WIDTH, K):
        k = start + tl.arange(0, K)
        a = tl.load(pixels + k[None, :], mask=exists[:, None] & (k < WIDTH)[None, :], other=0.0)
        rows = matrix_ptr + (k * sizes.groups * sizes.c)[:, None]
        b = tl.load(rows + c[None, :], mask=(k < WIDTH)[:, None] & (c < channels)[None, :], other=0.0)
        block += product(a, b, PRECISION)
    return block


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return the matrix product of two blocks, accumulated in float32."""
    if PRECISION == "widened":
        # the interpreter multiplies bfloat16 as if it were an integer
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)
