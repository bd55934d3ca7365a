"""The gradient of the content encoder to the features that it reads, for channels_last maps in half precision, in one launch.

    dfeatures[s] = sum_{t, o} dlogits[q, o] * weight[o, t],  where target q reads source s by tap t

Pixels whose positions have the same remainders by the stride have the same taps. A tile has pixels of one such class. The epilogue applies
the derivatives of the ReLU and of a norm with running statistics, and sums what the gradients of the bias and of the norm need, so that no
other launch reads the gradient for it. Further programs of the same launch sum the gradient of the logits for the encoder's bias, and fill
the channels after the outputs with zeros, which the library that computes the gradient of the weight reads.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common.blocks import product
from ..launch import Launch
from .encoder import Cells, Layers, choose_block, count_warps, index_type, load_channels, normalize, order_constants
from .sums import Summed, Tiles, divide, plan_sum, sum_pixels

# the most programs for each block of columns; every program of `batch_norm.differentiate` adds the partial sums of all
MAX_PARTS = 1024
MAX_PARTS_OF_NORM = 512
# the most programs that sum the gradient of the logits, beside the others
MAX_PARTS_OF_LOGITS = 128


@triton.jit
def differentiate_encoder(
    sizes: Cells,
    tiles: Tiles,  # of the pixels of one class
    logit_tiles: Tiles,
    dlogits_ptr,  # [N, HQ, WQ, ROW]
    kept_ptr,  # [ROW, *kernel, WIDTH], the weight
    features_ptr,  # [N, H, W, WIDTH], the result of the compressor; after the norm unless that takes the statistics of the batch
    statistics_ptr,  # [2, WIDTH], mean and 1 / deviation of the batch
    variance_ptr,  # [WIDTH], of a norm with running statistics
    scale_ptr,  # [WIDTH]
    shift_ptr,  # [WIDTH]
    gradient_ptr,  # [N, H, W, WIDTH]; without a compressor, the gradient of x, to which that of the encoder is added
    normalized_ptr,  # [N, H, W, WIDTH], what a norm with statistics of the batch makes of the features
    logit_partials_ptr,  # [PARTS, COLUMNS]
    partials_ptr,  # [1 or 2, PARTS, COLUMNS]
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    MAP: tl.constexpr,
    SUMS: tl.constexpr,  # blocks of columns of the gradient of the logits
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fill or add to the gradient, and fill the partial sums of both gradients and the normalised features."""
    pid = tl.program_id(0)
    if pid < logit_tiles.parts * SUMS:
        sum_pixels(pid, logit_tiles, dlogits_ptr, logit_partials_ptr, MAP, INDEX)
    else:
        M: tl.constexpr = BLOCK.m
        N: tl.constexpr = BLOCK.n
        K: tl.constexpr = BLOCK.k
        WIDTH: tl.constexpr = LAYERS.width
        PARTS: tl.constexpr = (WIDTH + N - 1) // N
        STEPS: tl.constexpr = (LAYERS.outputs + K - 1) // K
        TAPS: tl.constexpr = LAYERS.kernel_h * LAYERS.kernel_w
        CLASSES: tl.constexpr = LAYERS.stride_h * LAYERS.stride_w
        pid -= logit_tiles.parts * SUMS
        part, n = pid // PARTS, pid % PARTS * N + tl.arange(0, N)
        k = tl.arange(0, K)
        rows, columns = tl.cdiv(sizes.h, LAYERS.stride_h), tl.cdiv(sizes.w, LAYERS.stride_w)
        if LAYERS.batch:
            mean, rate = load_channels(statistics_ptr, n, WIDTH), load_channels(statistics_ptr + WIDTH, n, WIDTH)
        elif LAYERS.normalized:
            factor = tl.rsqrt(load_channels(variance_ptr, n, WIDTH) + LAYERS.eps) * load_channels(scale_ptr, n, WIDTH)
        total = tl.zeros((N,), tl.float32)
        products = tl.zeros((N,), tl.float32)
        for step in range(tiles.steps):
            # the tiles of all classes of the same pixels follow each other
            tile = part * tiles.steps + step
            m = (tile // CLASSES).to(INDEX) * M + tl.arange(0, M)
            exists = m < tiles.pixels
            row, v = m // columns, m % columns
            image, u = row // rows, row % rows
            i0, j0 = tile % CLASSES // LAYERS.stride_w, tile % CLASSES % LAYERS.stride_w
            i, j = u * LAYERS.stride_h + i0, v * LAYERS.stride_w + j0
            exists = exists & (i < sizes.h) & (j < sizes.w)
            cells = dlogits_ptr + ((image * sizes.hq + u) * sizes.wq + v)[:, None] * MAP.row
            sums = tl.zeros((M, N), tl.float32)
            for turn in range(TAPS * STEPS):
                tap, o = turn // STEPS, turn % STEPS * K + k
                di = i0 + LAYERS.padding_h - tap // LAYERS.kernel_w * LAYERS.dilation_h
                dj = j0 + LAYERS.padding_w - tap % LAYERS.kernel_w * LAYERS.dilation_w
                if (di % LAYERS.stride_h == 0) & (dj % LAYERS.stride_w == 0):
                    di, dj = di // LAYERS.stride_h, dj // LAYERS.stride_w
                    q, r = u + di, v + dj
                    inside = exists & (q >= 0) & (q < sizes.hq) & (r >= 0) & (r < sizes.wq)
                    mask = inside[:, None] & (o < MAP.loaded)[None, :]
                    a = tl.load(cells + (di * sizes.wq + dj) * MAP.row + o[None, :], mask=mask, other=0.0)
                    if LAYERS.outputs < MAP.loaded:
                        # other programs fill these channels
                        a = tl.where((o < LAYERS.outputs)[None, :], a, 0.0)
                    weight = kept_ptr + (o * TAPS + tap)[:, None] * WIDTH + n[None, :]
                    w = tl.load(weight, mask=(o < LAYERS.outputs)[:, None] & (n < WIDTH)[None, :], other=0.0)
                    sums += product(a, w, PRECISION)
            at = ((image * sizes.h + i) * sizes.w + j)[:, None] * WIDTH + n[None, :]
            mask = exists[:, None] & (n < WIDTH)[None, :]
            if not LAYERS.compressed:
                sums += tl.load(gradient_ptr + at, mask=mask, other=0.0).to(tl.float32)
            elif LAYERS.batch:
                features = tl.load(features_ptr + at, mask=mask, other=0.0).to(tl.float32)
                normalized = normalize(features, n, statistics_ptr, scale_ptr, shift_ptr, WIDTH).to(normalized_ptr.dtype.element_ty)
                tl.store(normalized_ptr + at, normalized, mask=mask)
                # NaN passes, as it does in PyTorch
                sums = tl.where(normalized <= 0, 0.0, sums)
            elif LAYERS.rectified:
                sums = tl.where(tl.load(features_ptr + at, mask=mask, other=0.0) <= 0, 0.0, sums)
            if LAYERS.normalized and not LAYERS.batch:
                sums *= factor[None, :]
            gradient = sums.to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + at, gradient, mask=mask)
            # the sums are those of the rounded gradient
            sums = gradient.to(tl.float32)
            total += tl.sum(sums, axis=0)
            if LAYERS.batch:
                products += tl.sum(sums * ((features - mean[None, :]) * rate[None, :]), axis=0)
        if LAYERS.compressed:
            to = partials_ptr + part * (PARTS * N) + n
            tl.store(to, total)
            if LAYERS.batch:
                tl.store(to + tiles.parts * (PARTS * N), products)


class Norm(NamedTuple):
    """What the gradient reads of a norm of the compressor; None for all without one."""

    variance: Tensor | None  # the running variance [width]
    scale: Tensor | None
    shift: Tensor | None


class Division:
    """How programs divide the work of `differentiate_encoder`.

    Args:
        maps: N, H, W of the features.
        cells: H, W of the logits.
        layers: what is compiled in of the layers.
    """

    def __init__(self, maps: tuple[int, int, int], cells: tuple[int, int], layers: Layers):
        n, h, w = maps
        self.map: Summed = plan_sum(layers.kept_rows, layers.outputs)
        self.logit_tiles: Tiles = divide(n * cells[0] * cells[1], self.map.height, MAX_PARTS_OF_LOGITS)
        pixels = n * triton.cdiv(h, layers.stride_h) * triton.cdiv(w, layers.stride_w)
        self.block = choose_block(pixels, layers.width, layers.outputs, 64)
        tiles = triton.cdiv(pixels, self.block.m) * layers.stride_h * layers.stride_w
        self.tiles: Tiles = divide(tiles, 1, MAX_PARTS_OF_NORM if layers.batch else MAX_PARTS)._replace(pixels=pixels)
        self.blocks = triton.cdiv(layers.width, self.block.n)
        self.logit_partials = 1, self.logit_tiles.parts, self.map.columns
        self.partials = 1 + layers.batch, self.tiles.parts, self.blocks * self.block.n


def encoder_gradient_launch(
    dlogits: Tensor,
    kept: Tensor,
    features: Tensor,
    gradient: Tensor | None,
    logit_partials: Tensor,
    partials: Tensor | None,
    norm: Norm,
    layers: Layers,
    statistics: Tensor | None = None,
    normalized: Tensor | None = None,
    *,
    precision: str = "ieee",
) -> Launch:
    """Return the launch of the gradient to the features, on any device, including "meta".

    Args:
        dlogits: [N, kept_rows, HQ, WQ] in channels_last. Channels after the outputs are filled with zeros.
        kept: the weight [kept_rows, *kernel, width] that `compress_launch` copies.
        features: [N, width, H, W] in channels_last.
        gradient: [N, width, H, W] in channels_last, filled with the gradient of what the compressor computes, or of what a norm with
            statistics of the batch computes before the ReLU; without a compressor, added to. None if it is not needed.
        logit_partials: partial sums of the gradient of the logits [1, parts, columns] in float32, filled, see `Division`.
        partials: those of `gradient`, and for a norm with statistics of the batch of its products with the normalised features
            [1 or 2, parts, columns]; None without a compressor.
        norm, layers: the parameters of the norm, and what is compiled in of the layers.
        statistics, normalized: mean and 1 / deviation of the features [2, width] in float32, and what the norm and the ReLU make of the
            features [N, width, H, W] in channels_last, filled, if the norm takes the statistics of the batch.
        precision: "widened" in the interpreter, see `blocks.product`.
    """
    n, _, h, w = features.shape
    hq, wq = dlogits.shape[2:]
    division = Division((n, h, w), (hq, wq), layers)
    given: dict[str, Tensor | None] = {
        "features_ptr": features if layers.rectified else None,
        "statistics_ptr": statistics,
        "variance_ptr": norm.variance,
        "scale_ptr": norm.scale,
        "shift_ptr": norm.shift,
        "gradient_ptr": gradient,
        "normalized_ptr": normalized,
        "logit_partials_ptr": logit_partials,
        "partials_ptr": partials,
    }
    arguments: dict[str, Any] = {
        "sizes": Cells(n * hq * wq, h, w, hq, wq),
        "tiles": division.tiles,
        "logit_tiles": division.logit_tiles,
        "dlogits_ptr": dlogits,
        "kept_ptr": kept,
        # the kernel does not touch what is not given
        **{name: logit_partials if t is None else t for name, t in given.items()},
    }
    sums = division.map.columns // division.map.width
    constants = {"LAYERS": layers, "BLOCK": division.block, "MAP": division.map, "SUMS": sums}
    constants |= {"INDEX": index_type(dlogits, features), "PRECISION": precision}
    programs = division.logit_tiles.parts * sums + (0 if gradient is None else division.tiles.parts * division.blocks)
    grid = (programs, 1, 1)
    warps = count_warps(division.block, 32)
    # with this limit of registers, a multiprocessor holds one third more programs, and nothing spills
    return Launch(differentiate_encoder, grid, arguments, order_constants(differentiate_encoder, constants), warps, 3, 128)
