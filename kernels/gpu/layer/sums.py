"""Sums over the pixels of channels_last maps, in float32 and without atomics: the gradients of biases and of a norm.

Programs add tiles of a map, and each stores one partial sum for every channel. `finish` adds these for all parameters of the module, and
casts the gradients of its weights, in one launch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common.records import Features
from ..launch import Launch
from .encoder import Layers

# elements of a map that a program reads at once
TILE = 4096
# elements of a load of 16 bytes
VECTOR = 8
COPY_BLOCK = 1024
SUM_BLOCK = 16


class Tiles(NamedTuple):
    """How programs divide a map [PIXELS, channels]."""

    pixels: int
    parts: int  # programs for each block of columns
    steps: int  # tiles of each of them


class Summed(NamedTuple):
    """The map [PIXELS, ROW] that `sum_pixels` sums, in tiles. A constant."""

    row: int  # elements from one pixel to the next
    channels: int  # those that are summed; the others are filled with zeros
    height: int  # pixels of a tile
    width: int  # channels of a tile
    columns: int  # those of all tiles side by side, and of the partial sums
    loaded: int  # channels that are loaded, in runs of 16 bytes
    cleared: int  # the first channel of the runs that are stored where others follow the summed channels; the row if none does


class Finished(NamedTuple):
    """What `finish` computes."""

    encoder: int  # programs that copy the gradient of the encoder's weight
    compressor: int  # those for the compressor's weight
    logits: int  # those that add partial sums of the encoder's bias; those for the features follow
    parts: int  # partial sums of the logits
    columns: int  # of these
    c: int  # input channels of the compressor
    feature_parts: int  # partial sums of the features
    feature_columns: int


def block_width(row: int) -> int:
    """Return the columns of a tile of a map with rows of this many elements."""
    return max(16, min(128, triton.next_power_of_2(row)))


def divide(pixels: int, rows: int, most: int) -> Tiles:
    """Divide a map into tiles of this many pixels, among at most this many programs for each block of columns."""
    tiles = triton.cdiv(pixels, rows)
    steps = triton.cdiv(tiles, most)
    return Tiles(pixels, triton.cdiv(tiles, steps), steps)


def plan_sum(row: int, channels: int) -> Summed:
    """Return how the first channels of maps with rows of this many elements are summed."""
    width = block_width(row)
    cleared = channels // VECTOR * VECTOR if channels < row else row
    return Summed(row, channels, TILE // width, width, -(-row // width) * width, min(row, -(-channels // VECTOR) * VECTOR), cleared)


@triton.jit
def sum_pixels(pid, tiles: Tiles, map_ptr, partials_ptr, MAP: tl.constexpr, INDEX: tl.constexpr):
    """Fill the partial sums [PARTS, COLUMNS] of a map [PIXELS, ROW], and the channels after those that are summed with zeros."""
    M: tl.constexpr = MAP.height
    N: tl.constexpr = MAP.width
    BLOCKS: tl.constexpr = MAP.columns // N
    part, n = pid // BLOCKS, pid % BLOCKS * N + tl.arange(0, N)
    sums = tl.zeros((M, N), tl.float32)
    for step in range(tiles.steps):
        m = (step * tiles.parts + part).to(INDEX) * M + tl.arange(0, M)
        at = m[:, None] * MAP.row + n[None, :]
        exists = (m < tiles.pixels)[:, None]
        values = tl.load(map_ptr + at, mask=exists & (n < MAP.loaded)[None, :], other=0.0)
        if MAP.channels < MAP.loaded:
            values = tl.where((n < MAP.channels)[None, :], values, 0.0)
        if MAP.row > MAP.cleared:
            tl.store(map_ptr + at, values, mask=exists & (n >= MAP.cleared)[None, :] & (n < MAP.row)[None, :])
        sums += values.to(tl.float32)
    tl.store(partials_ptr + part * MAP.columns + n, tl.sum(sums, axis=0))


@triton.jit
def add_partials(partials_ptr, n, parts, columns, N: tl.constexpr, ROWS: tl.constexpr):
    """Add partial sums [PARTS, COLUMNS] of the channels n."""
    p = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, N), tl.float32)
    for start in range(0, parts, ROWS):
        sums += tl.load(partials_ptr + (start + p)[:, None] * columns + n[None, :], mask=(start + p < parts)[:, None], other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _copy_gradient(block, source_ptr, to: Features, count, inputs, KERNEL_W: tl.constexpr, TAPS: tl.constexpr, SIZE: tl.constexpr):
    """Copy SIZE elements of a gradient [outputs, *kernel, inputs] in the dtype and the strides of its parameter."""
    at = block * SIZE + tl.arange(0, SIZE)
    c, rest = at % inputs, at // inputs
    tap, o = rest % TAPS, rest // TAPS
    offset = o * to.stride_n + c * to.stride_c + tap // KERNEL_W * to.stride_h + tap % KERNEL_W * to.stride_w
    values = tl.load(source_ptr + at, mask=at < count, other=0.0)
    tl.store(to.ptr + offset, values.to(to.ptr.dtype.element_ty), mask=at < count)


@triton.jit
def _store_channels(ptr, n, values, CHANNELS: tl.constexpr):
    tl.store(ptr + n, values.to(ptr.dtype.element_ty), mask=n < CHANNELS)


@triton.jit
def finish(
    jobs: Finished,
    encoder_ptr,  # [ROWS, *kernel, WIDTH], the gradient of the encoder's copied weight
    encoder: Features,  # [OUTPUTS, WIDTH, *kernel], that of the parameter
    compressor_ptr,  # [WIDTH, C]
    compressor: Features,  # [WIDTH, C, 1, 1]
    partials_ptr,  # [PARTS, COLUMNS]
    encoder_bias_ptr,  # [OUTPUTS]
    feature_partials_ptr,  # [1 or 2, FEATURE_PARTS, FEATURE_COLUMNS]
    bias_ptr,  # [WIDTH], of the compressor
    scale_ptr,  # [WIDTH], of the norm
    shift_ptr,  # [WIDTH]
    LAYERS: tl.constexpr,
    SIZE: tl.constexpr,
    N: tl.constexpr,
):
    """Fill the gradients of the parameters."""
    TAPS: tl.constexpr = LAYERS.kernel_h * LAYERS.kernel_w
    pid = tl.program_id(0)
    if pid < jobs.encoder:
        _copy_gradient(pid, encoder_ptr, encoder, LAYERS.outputs * TAPS * LAYERS.width, LAYERS.width, LAYERS.kernel_w, TAPS, SIZE)
    elif pid < jobs.encoder + jobs.compressor:
        _copy_gradient(pid - jobs.encoder, compressor_ptr, compressor, LAYERS.width * jobs.c, jobs.c, 1, 1, SIZE)
    elif pid < jobs.encoder + jobs.compressor + jobs.logits:
        n = (pid - jobs.encoder - jobs.compressor) * N + tl.arange(0, N)
        sums = add_partials(partials_ptr, n, jobs.parts, jobs.columns, N, 64)
        _store_channels(encoder_bias_ptr, n, sums, LAYERS.outputs)
    else:
        n = (pid - jobs.encoder - jobs.compressor - jobs.logits) * N + tl.arange(0, N)
        sums = add_partials(feature_partials_ptr, n, jobs.feature_parts, jobs.feature_columns, N, 64)
        if LAYERS.batch:
            _store_channels(shift_ptr, n, sums, LAYERS.width)
            products = feature_partials_ptr + jobs.feature_parts * jobs.feature_columns
            _store_channels(scale_ptr, n, add_partials(products, n, jobs.feature_parts, jobs.feature_columns, N, 64), LAYERS.width)
            # exact, because the norm subtracts the bias with the mean of the batch
            sums = tl.zeros_like(sums)
        _store_channels(bias_ptr, n, sums, LAYERS.width)


def finish_launch(
    gradients: Sequence[Tensor | None],
    encoder: Tensor | None,
    compressor: Tensor | None,
    partials: Tensor,
    feature_partials: Tensor | None,
    layers: Layers,
) -> Launch:
    """Return the launch that fills the gradients of the parameters, on any device, including "meta".

    Args:
        gradients: of the weight and bias of the compressor, the scale and shift of the norm, the weight and bias of the encoder. The
            gradients of biases, scale and shift are filled if their partial sums are given, those of weights if these are given.
        encoder: the gradient of the encoder's kept weight [rows, width, *kernel] in channels_last.
        compressor: that of the compressor's [width, C].
        partials: those of the gradient of the logits [1, parts, columns].
        feature_partials: those of the gradient of the features, or of what follows a norm that takes the statistics of the batch.
        layers: what is compiled in of the layers.
    """
    weight, bias, scale, shift, encoder_weight, encoder_bias = gradients
    # the kernel does not touch what is not given
    absent = Features(partials, 0, 0, 0, 0)
    jobs = Finished(
        0 if encoder is None else triton.cdiv(encoder_weight.numel(), COPY_BLOCK),
        0 if compressor is None else triton.cdiv(compressor.numel(), COPY_BLOCK),
        triton.cdiv(layers.outputs, SUM_BLOCK),
        *partials.shape[1:],
        0 if compressor is None else compressor.shape[1],
        *(feature_partials.shape[1:] if feature_partials is not None else (0, 0)),
    )
    arguments: dict[str, Any] = {
        "jobs": jobs,
        "encoder_ptr": partials if encoder is None else encoder,
        "encoder": absent if encoder is None else Features(encoder_weight, *encoder_weight.stride()),
        "compressor_ptr": partials if compressor is None else compressor,
        "compressor": absent if compressor is None else Features(weight, *weight.stride()),
        "partials_ptr": partials,
        "encoder_bias_ptr": encoder_bias,
        "feature_partials_ptr": partials if feature_partials is None else feature_partials,
        **{name: partials if t is None else t for name, t in (("bias_ptr", bias), ("scale_ptr", scale), ("shift_ptr", shift))},
    }
    features = 0 if feature_partials is None else triton.cdiv(layers.width, SUM_BLOCK)
    constants = {"LAYERS": layers, "SIZE": COPY_BLOCK, "N": SUM_BLOCK}
    return Launch(finish, (jobs.encoder + jobs.compressor + jobs.logits + features, 1, 1), arguments, constants, 4, 1)
