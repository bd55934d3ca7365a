"""Batch normalisation with statistics of the batch, and the ReLU that follows, for channels_last maps [PIXELS, WIDTH] in half precision.

The kernel that computes the features stores the mean of each of its blocks of pixels, and the sum of squared differences from it. `combine`
merges these, so that no large numbers are subtracted, and updates the running statistics. `normalize` applies them. In the backward pass,
`sum_pixels` sums the gradient of each channel and its products with the normalised features, and `differentiate` fills the gradient of the
features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .encoder import Layers, feature_blocks, index_type, load_channels
from .launch import Launch
from .sums import TILE, Tiles, add_partials, block_width, divide

BLOCK_OF_PARTIALS = 1024
MAX_PROGRAMS = 512


class Blocks(NamedTuple):
    """The blocks of pixels whose statistics `combine` merges."""

    pixels: int
    blocks: int
    size: int  # pixels of a block, except of the last


class Sums(NamedTuple):
    """The size of the partial sums that `sum_pixels` stores."""

    parts: int
    columns: int


@triton.jit
def combine(
    sizes: Blocks,
    partials_ptr,  # [2, WIDTH, BLOCKS], means and sums of squared differences
    statistics_ptr,  # [2, WIDTH], mean and 1 / deviation
    mean_ptr,  # [WIDTH], the running mean
    variance_ptr,  # [WIDTH]
    batches_ptr,  # the number of batches
    LAYERS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Fill the statistics of the batch, and update those of the norm as PyTorch does."""
    n = tl.program_id(0)
    means = partials_ptr + n * sizes.blocks
    squares = means + LAYERS.width * sizes.blocks
    sums = tl.zeros((SIZE,), tl.float32)
    for start in range(0, sizes.blocks, SIZE):
        block = start + tl.arange(0, SIZE)
        count = tl.minimum(sizes.pixels - block * sizes.size, sizes.size)
        sums += tl.load(means + block, mask=block < sizes.blocks, other=0.0) * count
    mean = tl.sum(sums, axis=0) / sizes.pixels
    sums = tl.zeros((SIZE,), tl.float32)
    for start in range(0, sizes.blocks, SIZE):
        block = start + tl.arange(0, SIZE)
        exists = block < sizes.blocks
        count = tl.minimum(sizes.pixels - block * sizes.size, sizes.size)
        difference = tl.load(means + block, mask=exists, other=0.0) - mean
        sums += tl.where(exists, tl.load(squares + block, mask=exists, other=0.0) + difference * difference * count, 0.0)
    square = tl.sum(sums, axis=0)
    tl.store(statistics_ptr + n, mean)
    tl.store(statistics_ptr + LAYERS.width + n, 1 / tl.sqrt(square / sizes.pixels + LAYERS.eps))
    running = tl.load(mean_ptr + n).to(tl.float32)
    tl.store(mean_ptr + n, (running + LAYERS.momentum * (mean - running)).to(mean_ptr.dtype.element_ty))
    running = tl.load(variance_ptr + n).to(tl.float32)
    variance = square / (sizes.pixels - 1)
    tl.store(variance_ptr + n, (running + LAYERS.momentum * (variance - running)).to(variance_ptr.dtype.element_ty))
    if n == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def normalize(
    tiles: Tiles,
    features_ptr,  # [PIXELS, WIDTH]
    statistics_ptr,  # [2, WIDTH]
    scale_ptr,  # [WIDTH]
    shift_ptr,  # [WIDTH]
    normalized_ptr,  # [PIXELS, WIDTH]
    LAYERS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Fill the normalised features after the ReLU."""
    BLOCKS: tl.constexpr = COLUMNS // N
    pid = tl.program_id(0)
    m = (pid // BLOCKS).to(INDEX) * M + tl.arange(0, M)
    n = pid % BLOCKS * N + tl.arange(0, N)
    at = m[:, None] * LAYERS.width + n[None, :]
    mask = (m < tiles.pixels)[:, None] & (n < LAYERS.width)[None, :]
    values = tl.load(features_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mean, rate = load_channels(statistics_ptr, n, LAYERS.width), load_channels(statistics_ptr + LAYERS.width, n, LAYERS.width)
    factor = rate * load_channels(scale_ptr, n, LAYERS.width)
    values = (values - mean[None, :]) * factor[None, :] + load_channels(shift_ptr, n, LAYERS.width)[None, :]
    # NaN stays NaN
    values = tl.where(values < 0, 0.0, values)
    tl.store(normalized_ptr + at, values.to(normalized_ptr.dtype.element_ty), mask=mask)


@triton.jit
def differentiate(
    tiles: Tiles,
    gradient_ptr,  # [PIXELS, WIDTH], of the normalised features, replaced by that of the features
    normalized_ptr,  # [PIXELS, WIDTH]
    features_ptr,  # [PIXELS, WIDTH]
    statistics_ptr,  # [2, WIDTH]
    scale_ptr,  # [WIDTH]
    partials_ptr,  # [2, parts, columns]
    sums: Sums,
    LAYERS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Replace the gradient of the normalised features by that of the features."""
    BLOCKS: tl.constexpr = COLUMNS // N
    pid = tl.program_id(0)
    part, n = pid // BLOCKS, pid % BLOCKS * N + tl.arange(0, N)
    mean, rate = load_channels(statistics_ptr, n, LAYERS.width), load_channels(statistics_ptr + LAYERS.width, n, LAYERS.width)
    factor = rate * load_channels(scale_ptr, n, LAYERS.width)
    ROWS: tl.constexpr = M if M < 64 else 64
    average = add_partials(partials_ptr, n, sums.parts, sums.columns, N, ROWS) / tiles.pixels
    slope = add_partials(partials_ptr + sums.parts * sums.columns, n, sums.parts, sums.columns, N, ROWS) / tiles.pixels * rate
    for step in range(tiles.steps):
        m = (step * tiles.parts + part).to(INDEX) * M + tl.arange(0, M)
        at = m[:, None] * LAYERS.width + n[None, :]
        mask = (m < tiles.pixels)[:, None] & (n < LAYERS.width)[None, :]
        values = tl.load(gradient_ptr + at, mask=mask, other=0.0).to(tl.float32)
        values = tl.where(tl.load(normalized_ptr + at, mask=mask, other=0.0) <= 0, 0.0, values)
        features = tl.load(features_ptr + at, mask=mask, other=0.0).to(tl.float32)
        values = (values - average[None, :] - (features - mean[None, :]) * slope[None, :]) * factor[None, :]
        tl.store(gradient_ptr + at, values.to(gradient_ptr.dtype.element_ty), mask=mask)


def combine_launch(pixels: int, partials: Tensor, statistics: Tensor, running: Sequence[Tensor], layers: Layers) -> Launch:
    """Return the launch that fills the statistics of a batch [2, width], on any device, including "meta".

    Args:
        pixels: N * H * W.
        partials: [2, width, `feature_blocks`], from `compress`.
        statistics: [2, width] in float32.
        running: the running mean and variance of the norm, and its number of batches.
        layers: what is compiled in of the layers.
    """
    blocks, size = feature_blocks(pixels)
    arguments = {"sizes": Blocks(pixels, blocks, size), "partials_ptr": partials, "statistics_ptr": statistics}
    arguments |= dict(zip(("mean_ptr", "variance_ptr", "batches_ptr"), running, strict=True))
    constants = {"LAYERS": layers, "SIZE": min(BLOCK_OF_PARTIALS, max(128, triton.next_power_of_2(blocks)))}
    return Launch(combine, (layers.width, 1, 1), arguments, constants, 4, 1)


def _tiled_launch(kernel: Any, tiles: Tiles, arguments: dict[str, Any], features: Tensor, layers: Layers) -> Launch:
    width = block_width(layers.width)
    blocks = triton.cdiv(layers.width, width)
    constants = {"LAYERS": layers, "M": TILE // width, "N": width, "COLUMNS": width * blocks, "INDEX": index_type(features)}
    return Launch(kernel, (tiles.parts * blocks, 1, 1), {"tiles": tiles} | arguments, constants, 8, 1)


def normalize_launch(features: Tensor, statistics: Tensor, scale: Tensor, shift: Tensor, normalized: Tensor, layers: Layers) -> Launch:
    """Return the launch that fills normalised features [N, width, H, W] in channels_last, on any device, including "meta"."""
    pixels = features.numel() // layers.width
    arguments = dict(features_ptr=features, statistics_ptr=statistics, scale_ptr=scale, shift_ptr=shift, normalized_ptr=normalized)
    return _tiled_launch(normalize, divide(pixels, block_width(layers.width), pixels), arguments, features, layers)


def differentiate_launch(
    gradient: Tensor, normalized: Tensor, features: Tensor, statistics: Tensor, scale: Tensor, partials: Tensor, layers: Layers
) -> Launch:
    """Return the launch that replaces the gradient of the normalised features by that of the features, on any device, including "meta".

    `partials` [2, parts, columns] are from `sum_pixels`; the other arguments are those of `normalize_launch`.
    """
    pixels = features.numel() // layers.width
    arguments = {
        "gradient_ptr": gradient,
        "normalized_ptr": normalized,
        "features_ptr": features,
        "statistics_ptr": statistics,
        "scale_ptr": scale,
        "partials_ptr": partials,
        "sums": Sums(*partials.shape[1:]),
    }
    return _tiled_launch(differentiate, divide(pixels, block_width(layers.width), MAX_PROGRAMS), arguments, features, layers)
