"""The compressor and the content encoder as compiled kernels: right results in an emulator, products on the matrix units, no spills."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.layer.encoder import Layers, Parameters, compress_launch, encode_launch
from ptx_step import emulate

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32


def build(n, c, h, w, *, width=None, outputs=25, kernel=3, stride=1, dilation=1, normalized=False, dtype=HALF, given=FLOAT, device="cpu"):
    """Return the tensors and launches of layers with random parameters; maps are full of NaN."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size, positive=False):
        drawn = torch.randn(size, generator=generator)
        return (drawn.abs() + 0.5 if positive else drawn).to(device, given)

    def empty(*size):
        return torch.full(size, math.nan, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)

    x = torch.randn(n, c, h, w, generator=generator).to(device, dtype, memory_format=torch.channels_last)
    layers = Layers(
        *(width is not None, normalized, normalized, 1e-3, width or c, outputs, -(-outputs // 16) * 16),
        *(kernel, kernel, stride, stride, kernel // 2 * dilation, kernel // 2 * dilation, dilation, dilation),
    )
    compressor = (draw(width, c, 1, 1), draw(width)) if width else (None, None)
    norm = [draw(width, positive=name == "variance") for name in ("mean", "variance", "scale", "shift")] if normalized else [None] * 4
    parameters = Parameters(*compressor, *norm, 0.1 * draw(outputs, width or c, kernel, kernel), draw(outputs))
    features = empty(n, width, h, w) if width else x
    logits = empty(n, layers.row, -(-h // stride), -(-w // stride))
    copy = torch.full((layers.copied,), math.nan, dtype=dtype, device=device)
    launches = [compress_launch(x, features, copy, parameters, layers), encode_launch(features, copy, logits, parameters, layers)]
    return x, features, logits, parameters, layers, launches


def define(x, parameters, layers):
    """Compute the layers in float64."""
    weight, bias, mean, variance, scale, shift, encoder_weight, encoder_bias = [t if t is None else t.double() for t in parameters]
    features = x.double()
    if weight is not None:
        features = F.conv2d(features, weight, bias)
    if mean is not None:
        features = F.batch_norm(features, mean, variance, scale, shift, eps=layers.eps).relu()
    pairs = [(getattr(layers, f"{name}_h"), getattr(layers, f"{name}_w")) for name in ("stride", "padding", "dilation")]
    return F.conv2d(features, encoder_weight, encoder_bias, *pairs)


@pytest.mark.parametrize(
    ("size", "options", "capability"),
    [
        ((1, 64, 6, 16), {"width": 64, "outputs": 100, "dtype": BF16}, 90),
        ((2, 40, 7, 9), {"width": 16, "stride": 2, "normalized": True, "dtype": BF16}, 80),
        ((1, 6, 5, 7), {"width": 5, "outputs": 27, "kernel": 5, "dilation": 2}, 80),
        ((2, 24, 5, 3), {"outputs": 130, "stride": 3, "given": HALF}, 90),
        ((1, 16, 4, 6), {"width": 16, "normalized": True, "given": BF16, "dtype": BF16}, 100),
    ],
    ids=str,
)
def test_results_match_float64(size, options, capability):
    x, features, logits, parameters, layers, launches = build(*size, **options)
    for launch in launches:
        counted = emulate(launch, capability)
        # all threads of a warp read one bank where a weight that is cast is staged in shared memory
        assert counted.get("shared_bank_conflicts", 0) <= counted["warp_insts"] / 10
    assert not features.isnan().any()
    exact = define(x, parameters, layers)
    error = (logits[:, : layers.outputs].double() - exact).abs().max() / exact.abs().max()
    assert error < (2e-3 if x.dtype == HALF else 1.2e-2)
    assert not logits[:, layers.outputs :].any()


@pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param((4, 256, 100, 168), {"width": 64, "outputs": 100}, marks=pytest.mark.slow),
        ((64, 64, 112, 112), {"width": 16, "stride": 2, "normalized": True}),
    ],
    ids=str,
)
def test_products_are_on_the_matrix_units(size, options):
    *_, launches = build(*size, **options, device="meta")
    for launch in launches:
        code = read_assembly(compile_launch(launch, 90))
        assert code.tensor_core["HGMMA"]
        assert not code.spills
        assert code.blocks >= 2
        assert code.widest_load == code.widest_store == 128
