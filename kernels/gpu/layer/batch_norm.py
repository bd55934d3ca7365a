"""Batch normalisation with statistics of the batch, for channels_last maps [PIXELS, WIDTH] in half precision.

The kernel that computes the features stores the mean of each of its blocks of pixels, and the sum of squared differences from it. `combine`
merges these, so that no large numbers are subtracted, and updates the running statistics. The encoder applies them to the features that it
reads. In the backward pass, its gradient sums what the norm needs of each channel, and `differentiate` fills the gradient of the features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from .encoder import Layers, feature_blocks, index_type, load_channels
from .sums import TILE, Tiles, add_partials, block_width, divide

BLOCK_OF_PARTIALS = 1024
MAX_PROGRAMS = 512


class Blocks(NamedTuple):
    """The blocks of pixels whose statistics `combine` merges."""

    pixels: int
    blocks: int
    size: int  # pixels of a block, except of the last


class Sums(NamedTuple):
    """The size of the partial sums of a gradient."""

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
def differentiate(
    tiles: Tiles,
    gradient_ptr,  # [PIXELS, WIDTH], of the norm's result, replaced by that of the features
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
    """Replace the gradient of the norm's result by that of the features."""
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


def differentiate_launch(gradient: Tensor, features: Tensor, statistics: Tensor, scale: Tensor, partials: Tensor, layers: Layers) -> Launch:
    """Return the launch that replaces the gradient of the norm's result by that of the features, on any device, including "meta".

    Args:
        gradient, features: [N, width, H, W] in channels_last.
        statistics: [2, width], from `combine_launch`.
        scale: of the norm [width].
        partials: [2, parts, columns], the sums of the gradient and of its products with the normalised features.
        layers: what is compiled in of the layers.
    """
    pixels, width = features.numel() // layers.width, block_width(layers.width)
    blocks, tiles = triton.cdiv(layers.width, width), divide(pixels, TILE // width, MAX_PROGRAMS)
    arguments = {
        "tiles": tiles,
        "gradient_ptr": gradient,
        "features_ptr": features,
        "statistics_ptr": statistics,
        "scale_ptr": scale,
        "partials_ptr": partials,
        "sums": Sums(*partials.shape[1:]),
    }
    constants = {"LAYERS": layers, "M": TILE // width, "N": width, "COLUMNS": width * blocks, "INDEX": index_type(features)}
    return Launch(differentiate, (tiles.parts * blocks, 1, 1), arguments, constants, 8, 1)
