"""Sums over the pixels of channels_last maps, in float32 and without atomics: the gradients of biases and of a norm.

`sum_pixels` adds tiles of the map in a few hundred programs, each of which stores one partial sum for every channel. `finish` adds these
for all parameters of the module, and casts the gradients of its weights, in one launch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .encoder import Layers, index_type, load_channels
from .launch import Launch
from .records import Features

# elements of a map that a program reads at once, and the most programs, which are all resident on a large GPU
TILE = 4096
MAX_PARTS = 512
# with three maps to read, fewer programs keep as many bytes in flight
MAX_PARTS_OF_NORM = 256
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
    """A map and what is summed of it. A constant."""

    row: int  # elements from one pixel to the next
    channels: int  # those that are summed; the others are filled with zeros
    rectified: bool  # whether a gradient is 0 where the result of a ReLU is
    scaled: bool  # whether a norm with running statistics scales it
    centred: bool  # whether the products with the normalised features of a batch are summed as well
    eps: float  # of the running variance

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return block_width(self.row)

    @property
    def columns(self) -> int:
        """Columns of the partial sums."""
        return -(-self.row // self.width) * self.width

    @property
    def loaded(self) -> int:
        """Channels that are loaded, in runs of 16 bytes."""
        return min(self.row, -(-self.channels // VECTOR) * VECTOR)

    @property
    def cleared(self) -> int:
        """The first channel of the runs that are stored where others follow the summed channels; the row if none does."""
        return self.channels // VECTOR * VECTOR if self.channels < self.row else self.row


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


def divide(pixels: int, width: int, most: int) -> Tiles:
    """Divide a map among at most this many programs for each block of columns."""
    tiles = triton.cdiv(pixels, TILE // width)
    steps = triton.cdiv(tiles, most)
    return Tiles(pixels, triton.cdiv(tiles, steps), steps)


@triton.jit
def sum_pixels(
    tiles: Tiles,
    map_ptr,  # [PIXELS, ROW]
    rectified_ptr,  # [PIXELS, ROW], the result of the ReLU
    features_ptr,  # [PIXELS, ROW], the input of the norm
    statistics_ptr,  # [2, ROW], mean and 1 / deviation of the features
    variance_ptr,  # [ROW], of a norm with running statistics
    scale_ptr,  # [ROW]
    partials_ptr,  # [1 or 2, PARTS, COLUMNS]
    MAP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOADED: tl.constexpr,
    CLEARED: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Fill the partial sums of a gradient, and write back what a ReLU and a norm with running statistics make of it."""
    BLOCKS: tl.constexpr = COLUMNS // N
    pid = tl.program_id(0)
    part, n = pid // BLOCKS, pid % BLOCKS * N + tl.arange(0, N)
    if MAP.scaled:
        factor = tl.rsqrt(load_channels(variance_ptr, n, MAP.channels) + MAP.eps) * load_channels(scale_ptr, n, MAP.channels)
    if MAP.centred:
        mean, rate = load_channels(statistics_ptr, n, MAP.channels), load_channels(statistics_ptr + MAP.channels, n, MAP.channels)
    sums = tl.zeros((M, N), tl.float32)
    products = tl.zeros((M, N), tl.float32)
    for step in range(tiles.steps):
        m = (step * tiles.parts + part).to(INDEX) * M + tl.arange(0, M)
        at = m[:, None] * MAP.row + n[None, :]
        exists = (m < tiles.pixels)[:, None]
        mask = exists & (n < LOADED)[None, :]
        loaded = tl.load(map_ptr + at, mask=mask, other=0.0)
        if MAP.channels < LOADED:
            loaded = tl.where((n < MAP.channels)[None, :], loaded, 0.0)
        values = loaded.to(tl.float32)
        if MAP.rectified:
            # NaN passes, as it does in PyTorch
            values = tl.where(tl.load(rectified_ptr + at, mask=mask, other=0.0) <= 0, 0.0, values)
        if MAP.scaled:
            values *= factor[None, :]
        if MAP.centred:
            features = tl.load(features_ptr + at, mask=mask, other=0.0).to(tl.float32)
            products += values * ((features - mean[None, :]) * rate[None, :])
        elif MAP.rectified:
            tl.store(map_ptr + at, values.to(map_ptr.dtype.element_ty), mask=mask)
        elif MAP.row > CLEARED:
            tl.store(map_ptr + at, loaded, mask=exists & (n >= CLEARED)[None, :] & (n < MAP.row)[None, :])
        sums += values
    to = partials_ptr + part * COLUMNS + n
    tl.store(to, tl.sum(sums, axis=0))
    if MAP.centred:
        tl.store(to + tiles.parts * COLUMNS, tl.sum(products, axis=0))


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


def find_tiles(pixels: int, summed: Summed) -> Tiles:
    """Divide a map of this many pixels among the programs of `sum_pixels`."""
    return divide(pixels, summed.width, MAX_PARTS_OF_NORM if summed.centred else MAX_PARTS)


def sum_launch(
    gradient: Tensor,
    partials: Tensor,
    summed: Summed,
    *,
    rectified: Tensor | None = None,
    features: Tensor | None = None,
    statistics: Tensor | None = None,
    variance: Tensor | None = None,
    scale: Tensor | None = None,
) -> Launch:
    """Return the launch that sums a gradient over its pixels, on any device, including "meta".

    Args:
        gradient: [N, row, H, W] in channels_last; channels that are not summed are filled with zeros. It is multiplied in place with the
            derivatives of a ReLU, and of a norm with running statistics, unless the norm takes the statistics of the batch.
        partials: [2 if centred else 1, parts, columns] in float32, filled, see `find_tiles`.
        summed: what is summed.
        rectified: the result of the ReLU, of the size of the gradient.
        features, statistics: the input of the norm, of the size of the gradient, and its mean and 1 / deviation [2, row] in float32.
        variance, scale: of a norm with running statistics [row].
    """
    pixels = gradient.numel() // summed.row
    maps = {"rectified_ptr": rectified, "features_ptr": features}
    channels = {"statistics_ptr": statistics, "variance_ptr": variance, "scale_ptr": scale}
    arguments: dict[str, Any] = {
        "tiles": find_tiles(pixels, summed),
        "map_ptr": gradient,
        # the kernel does not touch what is not given
        **{name: partials if t is None else t for name, t in (maps | channels).items()},
        "partials_ptr": partials,
    }
    sides = {"M": TILE // summed.width, "N": summed.width, "COLUMNS": summed.columns}
    constants = {"MAP": summed, **sides, "LOADED": summed.loaded, "CLEARED": summed.cleared, "INDEX": index_type(gradient)}
    grid = (arguments["tiles"].parts * (summed.columns // summed.width), 1, 1)
    return Launch(sum_pixels, grid, arguments, constants, 8, 1)


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
