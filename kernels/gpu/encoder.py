"""The compressor and the content encoder of the module, for channels_last maps in half precision and without gradients, in two launches.

`compress` is the 1x1 convolution, with the affine map of a norm and a ReLU in its epilogue, as a matrix product. Further programs of the
same launch copy the encoder's weight into the dtype and the order in which `encode`, the convolution that follows, multiplies it. Both read
parameters of any dtype in place, round features and logits once, and take less host time than one call of cuDNN or cuBLAS.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .blocks import product
from .launch import INT32_MAX, Launch
from .records import Features

COPY_BLOCK = 1024
# pixels from which on larger blocks still fill a device
MANY_PIXELS = 2**15


class Pixels(NamedTuple):
    """The sizes that `compress` takes."""

    pixels: int  # N * H * W
    c: int  # channels of x


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
    normalized: bool  # whether a norm with running statistics follows it
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

    @property
    def columns(self) -> int:
        """Columns of the copied weight, with zeros after the outputs."""
        block = block_columns(self.outputs)
        return -(-self.outputs // block) * block

    @property
    def copied(self) -> int:
        """Elements of the copied weight [kernel, width, columns]."""
        return self.kernel_h * self.kernel_w * self.width * self.columns


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


def _choose_block(pixels: int, outputs: int, inputs: int, deepest: int) -> Block:
    rows = 128 if pixels >= MANY_PIXELS else 64
    return Block(rows, block_columns(outputs), max(16, min(deepest, triton.next_power_of_2(inputs))))


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
def _load_channels(ptr, n, WIDTH: tl.constexpr):
    return tl.load(ptr + n, mask=n < WIDTH, other=0.0).to(tl.float32)


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
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    elif LAYERS.compressed:
        pid -= COPIED
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
        shift = _load_channels(bias_ptr, n, LAYERS.width)
        if LAYERS.normalized:
            scale = tl.rsqrt(_load_channels(variance_ptr, n, LAYERS.width) + LAYERS.eps) * _load_channels(scale_ptr, n, LAYERS.width)
            shift = (shift - _load_channels(mean_ptr, n, LAYERS.width)) * scale + _load_channels(shift_ptr, n, LAYERS.width)
            sums *= scale[None, :]
        sums += shift[None, :]
        if LAYERS.rectified:
            # NaN stays NaN
            sums = tl.where(sums < 0, 0.0, sums)
        to = features_ptr + m[:, None] * LAYERS.width + n[None, :]
        tl.store(to, sums.to(features_ptr.dtype.element_ty), mask=exists[:, None] & (n < LAYERS.width)[None, :])


@triton.jit
def encode(
    sizes: Cells,
    features_ptr,  # [N, H, W, WIDTH]
    copy_ptr,  # [*kernel, WIDTH, COLUMNS]
    bias_ptr,  # [OUTPUTS]
    logits_ptr,  # [N, HQ, WQ, ROW]
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
        inside = exists & (i >= 0) & (i < sizes.h) & (j >= 0) & (j < sizes.w)
        a = tl.load(pixels + (di * sizes.w + dj) * WIDTH + c[None, :], mask=inside[:, None] & (c < WIDTH)[None, :], other=0.0)
        w = tl.load(copy_ptr + (tap * WIDTH + c)[:, None] * COLUMNS + n[None, :], mask=(c < WIDTH)[:, None], other=0.0)
        sums += product(a, w, PRECISION)
    sums += _load_channels(bias_ptr, n, LAYERS.outputs)[None, :]
    to = logits_ptr + m[:, None] * LAYERS.row + n[None, :]
    tl.store(to, sums.to(logits_ptr.dtype.element_ty), mask=exists[:, None] & (n < LAYERS.row)[None, :])


def encoder_launches(
    x: Tensor, features: Tensor, copy: Tensor, logits: Tensor, parameters: Parameters, layers: Layers, *, precision: str = "ieee"
) -> list[Launch]:
    """Return the launches that encode x into logits, on any device, including "meta".

    Args:
        x: [N, C, H, W] in channels_last.
        features: [N, width, H, W] in channels_last, filled on the way; x itself without a compressor.
        copy: `layers.copied` elements of the dtype of x, filled on the way.
        logits: [N, row, HQ, WQ] in channels_last.
        parameters, layers: the parameters on the same device, and what is compiled in of the layers.
        precision: "widened" in the interpreter, see `blocks.product`.
    """
    n, c, h, w = x.shape
    hq, wq = logits.shape[2:]
    weight, bias, *statistics, encoder_weight, encoder_bias = parameters
    index = tl.int64 if max(x.numel(), features.numel(), logits.numel()) > INT32_MAX else tl.int32
    shared = {"LAYERS": layers, "COLUMNS": layers.columns, "INDEX": index, "PRECISION": precision}

    encoder = Features(encoder_weight, *encoder_weight.stride())
    copied = triton.cdiv(layers.copied, COPY_BLOCK)
    # few pixels in few programs wait for every step
    block = _choose_block(n * h * w, layers.width, c, 64 if n * h * w >= MANY_PIXELS else 128)
    # the kernel reads no parameter of an absent layer
    bias = encoder_bias if bias is None else bias
    given = [bias if tensor is None else tensor for tensor in statistics]
    arguments: dict[str, Any] = {
        "sizes": Pixels(n * h * w, c),
        "x_ptr": x,
        "weight": encoder if weight is None else Features(weight, *weight.stride()),
        "bias_ptr": bias,
        **dict(zip(("mean_ptr", "variance_ptr", "scale_ptr", "shift_ptr"), given, strict=True)),
        "features_ptr": features,
        "encoder": encoder,
        "copy_ptr": copy,
    }
    programs = triton.cdiv(n * h * w, block.m) * triton.cdiv(layers.width, block.n) if layers.compressed else 0
    constants = _order(compress, shared | {"BLOCK": block, "COPIED": copied, "SIZE": COPY_BLOCK})
    warps = 8 if block.n > 32 else 4
    # Loads are not staged in shared memory, where the threads that cast the weight would all read one bank. The limits of registers let
    # enough programs onto a multiprocessor to hide their latency.
    launches = [Launch(compress, (copied + programs, 1, 1), arguments, constants, warps, 1, 128 if warps == 8 else 168)]

    block = _choose_block(n * hq * wq, layers.outputs, layers.width, 64)
    arguments = {
        "sizes": Cells(n * hq * wq, h, w, hq, wq),
        "features_ptr": features,
        "copy_ptr": copy,
        "bias_ptr": encoder_bias,
        "logits_ptr": logits,
    }
    programs = triton.cdiv(n * hq * wq, block.m) * (layers.columns // block.n)
    launches.append(Launch(encode, (programs, 1, 1), arguments, _order(encode, shared | {"BLOCK": block}), 8 if block.n > 64 else 4, 3))
    return launches


def _order(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    return {name: constants[name] for name in kernel.arg_names if name in constants}
