"""The compressor and the content encoder of the module, for channels_last maps in half precision, in two launches.

`compress` is the 1x1 convolution, with the affine map of a norm and a ReLU in its epilogue, as a matrix product. Further programs of the
same launch copy the encoder's weight into the dtype and the order in which `encode`, the convolution that follows, multiplies it, and in
training both weights for the backward pass. Both kernels read parameters of any dtype in place, round features and logits once, and take
less host time than one call of cuDNN or cuBLAS. `encode` applies a norm with statistics of the batch to the features that it reads.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common.blocks import product
from ..common.records import Features
from ..launch import INT32_MAX, Launch

COPY_BLOCK = 1024
# pixels from which on larger blocks still fill a device
MANY_PIXELS = 2**15


class Pixels(NamedTuple):
    """The sizes that `compress` takes."""

    pixels: int  # N * H * W
    c: int  # channels of x
    kept: int  # programs that copy weights for the backward pass


class Cells(NamedTuple):
    """The sizes that `encode` takes."""

    pixels: int  # N * HQ * WQ
    h: int  # rows of the features
    w: int
    hq: int  # rows of the logits
    wq: int


class Layers(NamedTuple):
    """What is compiled in of the layers. A constant."""

    compressed: bool  # whether there is a compressor
    normalized: bool  # whether a norm follows it
    rectified: bool  # whether a ReLU follows that
    eps: float  # of the norm
    width: int  # channels of the features
    outputs: int  # channels of the logits
    row: int  # elements from one pixel of the logits to the next; those after the outputs are zeros
    kernel_h: int  # rows of the encoder's kernel
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    batch: bool = False  # whether the norm takes the statistics of the batch
    momentum: float = 0.0  # of its running statistics
    kept_rows: int = 0  # output channels of the encoder's weight that is copied for the backward pass; 0 without one

    @property
    def columns(self) -> int:
        """Columns of the copied weight, with zeros after the outputs."""
        block = block_columns(self.outputs)
        return -(-self.outputs // block) * block

    @property
    def copied(self) -> int:
        """Elements of the copied weight [kernel, width, columns]."""
        return self.kernel_h * self.kernel_w * self.width * self.columns

    @property
    def kept(self) -> int:
        """Elements of the encoder's weight that is copied for the backward pass."""
        return self.kept_rows * self.kernel_h * self.kernel_w * self.width


class Block(NamedTuple):
    """The block of a matrix product. A constant."""

    m: int  # pixels
    n: int  # output channels
    k: int  # input channels


class Parameters(NamedTuple):
    """The parameters of the layers; those of absent layers are None."""

    weight: Tensor | None  # of the compressor [WIDTH, C, 1, 1]
    bias: Tensor | None  # [WIDTH]
    mean: Tensor | None  # of the norm [WIDTH]
    variance: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    encoder_weight: Tensor  # [OUTPUTS, WIDTH, *kernel]
    encoder_bias: Tensor  # [OUTPUTS]


def block_columns(channels: int) -> int:
    """Return the output channels of a block for a product with this many."""
    return max(16, min(128, triton.next_power_of_2(channels)))


def choose_block(pixels: int, outputs: int, inputs: int, deepest: int) -> Block:
    """Return the block of a product of this many pixels, output channels and input channels, at most `deepest` of these."""
    rows = 128 if pixels >= MANY_PIXELS else 64
    return Block(rows, block_columns(outputs), max(16, min(deepest, triton.next_power_of_2(inputs))))


def count_warps(block: Block, columns: int) -> int:
    """Return the warps of a product whose left block is computed in registers: 8 with more than this many columns, if they share rows.

    Where they share columns, Triton 3.4 multiplies a block that is in registers wrongly for sm_90.
    """
    return 8 if block.n > columns and block.m >= 128 else 4


def _compressor_block(pixels: int, layers: Layers, inputs: int) -> Block:
    # few pixels in few programs wait for every step
    return choose_block(pixels, layers.width, inputs, 64 if pixels >= MANY_PIXELS else 128)


def feature_blocks(pixels: int) -> tuple[int, int]:
    """Return the number of blocks of pixels whose statistics `compress` stores, and the pixels of a block."""
    rows = choose_block(pixels, 1, 1, 1).m
    return triton.cdiv(pixels, rows), rows


@triton.jit
def _copy_weight(start, weight: Features, copy_ptr, LAYERS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr):
    """Copy COPY_BLOCK elements of weight [OUTPUTS, WIDTH, *kernel] to [*kernel, WIDTH, COLUMNS], with zeros after the outputs."""
    to = start + tl.arange(0, SIZE)
    column, row = to % COLUMNS, to // COLUMNS
    c, tap = row % LAYERS.width, row // LAYERS.width
    offset = column * weight.stride_n + c * weight.stride_c
    offset += tap // LAYERS.kernel_w * weight.stride_h + tap % LAYERS.kernel_w * weight.stride_w
    exists = tap < LAYERS.kernel_h * LAYERS.kernel_w
    values = tl.load(weight.ptr + offset, mask=exists & (column < LAYERS.outputs), other=0.0)
    tl.store(copy_ptr + to, values.to(copy_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _keep_weights(start, encoder: Features, weight: Features, kept_ptr, c, LAYERS: tl.constexpr, KEPT: tl.constexpr, SIZE: tl.constexpr):
    """Copy SIZE elements of the weights to [KEPT_ROWS, *kernel, WIDTH], with zeros after the outputs, followed by [WIDTH, C]."""
    TAPS: tl.constexpr = LAYERS.kernel_h * LAYERS.kernel_w
    to = start + tl.arange(0, SIZE)
    column, rest = to % LAYERS.width, to // LAYERS.width
    tap, o = rest % TAPS, rest // TAPS
    offset = o * encoder.stride_n + column * encoder.stride_c
    offset += tap // LAYERS.kernel_w * encoder.stride_h + tap % LAYERS.kernel_w * encoder.stride_w
    values = tl.load(encoder.ptr + offset, mask=o < LAYERS.outputs, other=0.0).to(kept_ptr.dtype.element_ty)
    exists = to < KEPT
    if LAYERS.compressed:
        at = to - KEPT
        row = at // c
        inside = (at >= 0) & (row < LAYERS.width)
        others = tl.load(weight.ptr + row * weight.stride_n + at % c * weight.stride_c, mask=inside, other=0.0)
        values = tl.where(exists, values, others.to(kept_ptr.dtype.element_ty))
        exists = exists | inside
    tl.store(kept_ptr + to, values, mask=exists)


@triton.jit
def load_channels(ptr, n, WIDTH: tl.constexpr):
    """Return values of the channels n in float32, zero from WIDTH on."""
    return tl.load(ptr + n, mask=n < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def normalize(values, n, statistics_ptr, scale_ptr, shift_ptr, WIDTH: tl.constexpr):
    """Return what a norm with the statistics of the batch, and the ReLU that follows, make of features [..., channels n] in float32."""
    mean, rate = load_channels(statistics_ptr, n, WIDTH), load_channels(statistics_ptr + WIDTH, n, WIDTH)
    factor = rate * load_channels(scale_ptr, n, WIDTH)
    values = (values - mean[None, :]) * factor[None, :] + load_channels(shift_ptr, n, WIDTH)[None, :]
    # NaN stays NaN
    return tl.where(values < 0, 0.0, values)


@triton.jit
def compress(
    sizes: Pixels,
    x_ptr,  # [PIXELS, C]
    weight: Features,  # [WIDTH, C, 1, 1]
    bias_ptr,  # [WIDTH]
    mean_ptr,  # [WIDTH]
    variance_ptr,  # [WIDTH]
    scale_ptr,  # [WIDTH]
    shift_ptr,  # [WIDTH]
    features_ptr,  # [PIXELS, WIDTH]
    encoder: Features,  # [OUTPUTS, WIDTH, *kernel]
    copy_ptr,  # [*kernel, WIDTH, COLUMNS]
    kept_ptr,  # [KEPT_ROWS, *kernel, WIDTH], then [WIDTH, C]
    partials_ptr,  # [2, WIDTH, blocks of pixels], means and sums of squared differences
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,  # elements of the encoder's weight that are kept
    COPIED: tl.constexpr,  # programs that copy the encoder's weight, before the others
    SIZE: tl.constexpr,  # elements that each of them copies
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fill the features, unless they are x itself, and the copy of the encoder's weight."""
    M: tl.constexpr = BLOCK.m
    N: tl.constexpr = BLOCK.n
    K: tl.constexpr = BLOCK.k
    pid = tl.program_id(0)
    if pid < COPIED:
        _copy_weight(pid * SIZE, encoder, copy_ptr, LAYERS, COLUMNS, SIZE)
    elif pid < COPIED + sizes.kept:
        if KEPT:
            _keep_weights((pid - COPIED) * SIZE, encoder, weight, kept_ptr, sizes.c, LAYERS, KEPT, SIZE)
    elif LAYERS.compressed:
        pid -= COPIED + sizes.kept
        PARTS: tl.constexpr = (LAYERS.width + N - 1) // N
        m = (pid // PARTS).to(INDEX) * M + tl.arange(0, M)
        n = pid % PARTS * N + tl.arange(0, N)
        k = tl.arange(0, K)
        exists = m < sizes.pixels
        x_rows = x_ptr + m[:, None] * sizes.c
        weight_rows = weight.ptr + n[None, :] * weight.stride_n
        sums = tl.zeros((M, N), tl.float32)
        for start in range(0, sizes.c, K):
            c = start + k
            a = tl.load(x_rows + c[None, :], mask=exists[:, None] & (c < sizes.c)[None, :], other=0.0)
            w = tl.load(weight_rows + (c * weight.stride_c)[:, None], mask=(n < LAYERS.width)[None, :] & (c < sizes.c)[:, None], other=0.0)
            sums += product(a, w.to(a.dtype), PRECISION)
        shift = load_channels(bias_ptr, n, LAYERS.width)
        if LAYERS.normalized and not LAYERS.batch:
            scale = tl.rsqrt(load_channels(variance_ptr, n, LAYERS.width) + LAYERS.eps) * load_channels(scale_ptr, n, LAYERS.width)
            shift = (shift - load_channels(mean_ptr, n, LAYERS.width)) * scale + load_channels(shift_ptr, n, LAYERS.width)
            sums *= scale[None, :]
        sums += shift[None, :]
        if LAYERS.rectified and not LAYERS.batch:
            # NaN stays NaN
            sums = tl.where(sums < 0, 0.0, sums)
        values = sums.to(features_ptr.dtype.element_ty)
        tl.store(features_ptr + m[:, None] * LAYERS.width + n[None, :], values, mask=exists[:, None] & (n < LAYERS.width)[None, :])
        if LAYERS.batch:
            # the statistics are those of the rounded features, which the norm reads
            sums = values.to(tl.float32)
            blocks, block = tl.cdiv(sizes.pixels, M), pid // PARTS
            mean = tl.sum(tl.where(exists[:, None], sums, 0.0), axis=0) / tl.minimum(sizes.pixels - block * M, M)
            difference = tl.where(exists[:, None], sums - mean[None, :], 0.0)
            to = partials_ptr + n * blocks + block
            tl.store(to, mean, mask=n < LAYERS.width)
            tl.store(to + LAYERS.width * blocks, tl.sum(difference * difference, axis=0), mask=n < LAYERS.width)


@triton.jit
def encode(
    sizes: Cells,
    features_ptr,  # [N, H, W, WIDTH]
    copy_ptr,  # [*kernel, WIDTH, COLUMNS]
    bias_ptr,  # [OUTPUTS]
    logits_ptr,  # [N, HQ, WQ, ROW]
    statistics_ptr,  # [2, WIDTH], mean and 1 / deviation of the batch
    scale_ptr,  # [WIDTH]
    shift_ptr,  # [WIDTH]
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fill the logits, with zeros in channels after the outputs."""
    M: tl.constexpr = BLOCK.m
    N: tl.constexpr = BLOCK.n
    K: tl.constexpr = BLOCK.k
    WIDTH: tl.constexpr = LAYERS.width
    PARTS: tl.constexpr = COLUMNS // N
    STEPS: tl.constexpr = (WIDTH + K - 1) // K
    TAPS: tl.constexpr = LAYERS.kernel_h * LAYERS.kernel_w
    pid = tl.program_id(0)
    m = (pid // PARTS).to(INDEX) * M + tl.arange(0, M)
    n = pid % PARTS * N + tl.arange(0, N)
    k = tl.arange(0, K)
    exists = m < sizes.pixels
    row, r = m // sizes.wq, m % sizes.wq
    image, q = row // sizes.hq, row % sizes.hq
    i0, j0 = q * LAYERS.stride_h - LAYERS.padding_h, r * LAYERS.stride_w - LAYERS.padding_w
    pixels = features_ptr + ((image * sizes.h + i0) * sizes.w + j0)[:, None] * WIDTH
    sums = tl.zeros((M, N), tl.float32)
    for step in range(TAPS * STEPS):
        tap, c = step // STEPS, step % STEPS * K + k
        di, dj = tap // LAYERS.kernel_w * LAYERS.dilation_h, tap % LAYERS.kernel_w * LAYERS.dilation_w
        i, j = i0 + di, j0 + dj
        inside = (exists & (i >= 0) & (i < sizes.h) & (j >= 0) & (j < sizes.w))[:, None] & (c < WIDTH)[None, :]
        a = tl.load(pixels + (di * sizes.w + dj) * WIDTH + c[None, :], mask=inside, other=0.0)
        if LAYERS.batch:
            values = normalize(a.to(tl.float32), c, statistics_ptr, scale_ptr, shift_ptr, WIDTH)
            # the padding is of the normalised features
            a = tl.where(inside, values, 0.0).to(a.dtype)
        w = tl.load(copy_ptr + (tap * WIDTH + c)[:, None] * COLUMNS + n[None, :], mask=(c < WIDTH)[:, None], other=0.0)
        sums += product(a, w, PRECISION)
    sums += load_channels(bias_ptr, n, LAYERS.outputs)[None, :]
    to = logits_ptr + m[:, None] * LAYERS.row + n[None, :]
    tl.store(to, sums.to(logits_ptr.dtype.element_ty), mask=exists[:, None] & (n < LAYERS.row)[None, :])


def compress_launch(
    x: Tensor,
    features: Tensor,
    copy: Tensor,
    parameters: Parameters,
    layers: Layers,
    kept: Tensor | None = None,
    partials: Tensor | None = None,
    *,
    precision: str = "ieee",
) -> Launch:
    """Return the launch that compresses x and copies weights, on any device, including "meta".

    Args:
        x: [N, C, H, W] in channels_last.
        features: [N, width, H, W] in channels_last, filled; x itself without a compressor.
        copy: `layers.copied` elements of the dtype of x, filled.
        parameters, layers: the parameters on the same device, and what is compiled in of the layers.
        kept: `layers.kept` elements and those of the compressor's weight, of the dtype of x, filled; None in inference.
        partials: [2, width, `feature_blocks`] in float32, filled if the norm takes the statistics of the batch.
        precision: "widened" in the interpreter, see `blocks.product`.
    """
    n, c, h, w = x.shape
    weight, bias, *statistics, encoder_weight, encoder_bias = parameters
    encoder = Features(encoder_weight, *encoder_weight.stride())
    copied = triton.cdiv(layers.copied, COPY_BLOCK)
    kept_programs = 0 if kept is None else triton.cdiv(kept.numel(), COPY_BLOCK)
    block = _compressor_block(n * h * w, layers, c)
    # the kernel neither reads a parameter of an absent layer nor fills what is not given
    bias = encoder_bias if bias is None else bias
    given = [bias if tensor is None else tensor for tensor in statistics]
    arguments: dict[str, Any] = {
        "sizes": Pixels(n * h * w, c, kept_programs),
        "x_ptr": x,
        "weight": encoder if weight is None else Features(weight, *weight.stride()),
        "bias_ptr": bias,
        **dict(zip(("mean_ptr", "variance_ptr", "scale_ptr", "shift_ptr"), given, strict=True)),
        "features_ptr": features,
        "encoder": encoder,
        "copy_ptr": copy,
        "kept_ptr": bias if kept is None else kept,
        "partials_ptr": bias if partials is None else partials,
    }
    programs = triton.cdiv(n * h * w, block.m) * triton.cdiv(layers.width, block.n) if layers.compressed else 0
    constants = {"BLOCK": block, "COPIED": copied, "SIZE": COPY_BLOCK, "KEPT": layers.kept}
    constants |= _shared_constants(layers, precision, x, features)
    warps = 8 if block.n > 32 else 4
    # Loads are not staged in shared memory, where the threads that cast the weight would all read one bank. The limits of registers let
    # enough programs onto a multiprocessor to hide their latency.
    grid = (copied + kept_programs + programs, 1, 1)
    return Launch(compress, grid, arguments, order_constants(compress, constants), warps, 1, 128 if warps == 8 else 168)


def encode_launch(
    features: Tensor,
    copy: Tensor,
    logits: Tensor,
    parameters: Parameters,
    layers: Layers,
    statistics: Tensor | None = None,
    *,
    precision: str = "ieee",
) -> Launch:
    """Return the launch that encodes features with the weight that `compress_launch` copies, on any device, including "meta".

    Args:
        features: [N, width, H, W] in channels_last.
        copy, parameters, layers, precision: as for `compress_launch`.
        logits: [N, row, HQ, WQ] in channels_last, filled.
        statistics: mean and 1 / deviation of the features [2, width] in float32, if the norm takes the statistics of the batch.
    """
    n, _, h, w = features.shape
    hq, wq = logits.shape[2:]
    *_, scale, shift, _, bias = parameters
    # the kernel does not touch what is not given
    norm = (bias,) * 3 if statistics is None else (statistics, scale, shift)
    block = choose_block(n * hq * wq, layers.outputs, layers.width, 64)
    arguments = {
        "sizes": Cells(n * hq * wq, h, w, hq, wq),
        "features_ptr": features,
        "copy_ptr": copy,
        "bias_ptr": bias,
        "logits_ptr": logits,
        **dict(zip(("statistics_ptr", "scale_ptr", "shift_ptr"), norm, strict=True)),
    }
    programs = triton.cdiv(n * hq * wq, block.m) * (layers.columns // block.n)
    constants = _shared_constants(layers, precision, features, logits) | {"BLOCK": block}
    warps = count_warps(block, 64) if layers.batch else 8 if block.n > 64 else 4
    return Launch(encode, (programs, 1, 1), arguments, order_constants(encode, constants), warps, 3)


def _shared_constants(layers: Layers, precision: str, *maps: Tensor) -> dict[str, Any]:
    return {"LAYERS": layers, "COLUMNS": layers.columns, "INDEX": index_type(*maps), "PRECISION": precision}


def index_type(*maps: Tensor) -> tl.dtype:
    """Return the type of offsets in maps."""
    return tl.int64 if max(t.numel() for t in maps) > INT32_MAX else tl.int32


def order_constants(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Return the constants of a kernel in the order of its parameters."""
    return {name: constants[name] for name in kernel.arg_names if name in constants}
