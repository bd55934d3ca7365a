"""The launch that copies features in NCHW to channels_last, for kernels whose tiles share features.

A tile reads the features around it. In NCHW these are short runs of pixels, which L2 sends in whole sectors, so that the tiles together
read the features many times. In channels_last a pixel is a long run of channels.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.blocks import align_strides, aligned, image, load, store
from ..common.records import Features, MapSizes, offset_type
from ..launch import Launch

# channels and pixels of a program
BLOCKS = {"BLOCK_C": 64, "BLOCK_P": 128}
NUM_WARPS = 4


@triton.jit
def transpose(
    sizes: MapSizes,
    source: Features,
    copy: Features,
    SOURCE_ALIGN: tl.constexpr,
    COPY_ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Fill a copy in channels_last with the features of the source; one program copies channels of a run of pixels."""
    source = align_strides(source, 1, SOURCE_ALIGN)
    copy = align_strides(copy, 0, COPY_ALIGN)
    channels, cols = aligned(sizes.c, COPY_ALIGN), aligned(sizes.w, SOURCE_ALIGN)
    pid = tl.program_id(0)
    parts, runs = tl.cdiv(channels, BLOCK_C), tl.cdiv(cols, BLOCK_P)
    c = pid % parts * BLOCK_C + tl.arange(0, BLOCK_C).to(INDEX)
    pid = pid // parts
    col = pid % runs * BLOCK_P + tl.arange(0, BLOCK_P).to(INDEX)
    pid = pid // runs
    row = (pid % sizes.h).to(INDEX)
    n = (pid // sizes.h).to(tl.int64)
    block = load(image(source, n, 0), row, col, col < cols, c, channels, 1, BLOCK_P)
    store(image(copy, n, 0), row, col, col < cols, c, channels, tl.trans(block), 0, BLOCK_P)


def transpose_launch(features: Tensor) -> tuple[Launch, Tensor]:
    """Return the launch that copies features [N, C, H, W] to channels_last, and the copy, which it fills."""
    n, c, h, w = features.shape
    copy = torch.empty(features.shape, dtype=features.dtype, device=features.device, memory_format=torch.channels_last)
    stride_n, stride_c, stride_h, stride_w = features.stride()
    # rows that follow one another are one row
    rows, cols = (1, h * w) if stride_h == w * stride_w else (h, w)
    vector = 16 // features.element_size()
    steps = (stride_n, stride_c) if rows == 1 else (stride_n, stride_c, stride_h)
    align = math.gcd(*steps, cols, vector) if stride_w == 1 else 1
    arguments = {
        "sizes": MapSizes(c, rows, cols),
        "source": Features(features, stride_n, stride_c, cols if rows == 1 else stride_h, stride_w),
        "copy": Features(copy, h * w * c, 1, cols * c, c),
    }
    constants = {"SOURCE_ALIGN": align, "COPY_ALIGN": math.gcd(c, vector), "INDEX": offset_type(features, copy)} | BLOCKS
    grid = (n * rows * triton.cdiv(cols, BLOCKS["BLOCK_P"]) * triton.cdiv(c, BLOCKS["BLOCK_C"]), 1, 1)
    return Launch(transpose, grid, arguments, constants, NUM_WARPS, 1), copy
