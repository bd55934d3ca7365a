"""The kernels of the module's training as compiled code: right results in an emulator, wide loads, no spills."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.batch_norm import combine_launch, differentiate_launch, normalize_launch
from carafepp.kernels.gpu.encoder import Layers, Parameters, compress_launch, feature_blocks
from carafepp.kernels.gpu.sums import Summed, find_tiles, finish_launch, sum_launch
from ptx_step import emulate

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
LAST = torch.channels_last


def make_layers(width, outputs, kernel=3, *, batch=False, rectified=None):
    normalized = batch if rectified is None else rectified
    geometry = (kernel, kernel, 1, 1, kernel // 2, kernel // 2, 1, 1)
    rows = -(-outputs // 16) * 16
    return Layers(True, normalized, normalized, 1e-3, width, outputs, rows, *geometry, batch, 0.25, 2 * rows)


def draw(*size, dtype=HALF, offset=0.0):
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64) + offset
    return drawn.to(dtype, memory_format=LAST) if len(size) == 4 else drawn.to(dtype)


def empty(*size, dtype=FLOAT, device="cpu"):
    return torch.full(size, math.nan, dtype=dtype, device=device)


def assert_near(value, exact, tolerance):
    assert ((value.double() - exact).abs().max() / exact.abs().max()).item() < tolerance


def partials_of(gradient, summed):
    tiles = find_tiles(gradient.numel() // summed.row, summed)
    return empty(1 + summed.centred, tiles.parts, summed.columns, device=gradient.device)


@pytest.mark.parametrize(
    ("size", "channels", "capability"), [((2, 32, 9, 11), 25, 80), ((1, 112, 30, 31), 100, 90), ((3, 6, 5, 7), 6, 80)], ids=str
)
def test_sums_of_a_bias(size, channels, capability):
    gradient, summed = draw(*size, offset=1.0), Summed(size[1], channels, False, False, False, 0.0)
    given = gradient.double()
    # memory that nobody has filled
    gradient[:, channels:] = math.nan
    partials = partials_of(gradient, summed)
    emulate(sum_launch(gradient, partials, summed), capability)
    assert_near(partials.double().sum((0, 1))[:channels], given[:, :channels].sum((0, 2, 3)), 1e-6)
    assert torch.equal(gradient[:, :channels].double(), given[:, :channels])
    assert not gradient[:, channels:].any()


@pytest.mark.parametrize("scaled", [False, True])
def test_sums_behind_a_frozen_norm(scaled):
    gradient, rectified = draw(2, 16, 9, 11, dtype=BF16), draw(2, 16, 9, 11, dtype=BF16, offset=0.3).relu()
    variance, scale = draw(16, dtype=FLOAT).abs() + 0.5, draw(16, dtype=FLOAT)
    summed = Summed(16, 16, True, scaled, False, 1e-3)
    partials = partials_of(gradient, summed)
    factor = (scale.double() / (variance.double() + 1e-3).sqrt()).view(1, 16, 1, 1) if scaled else 1.0
    exact = gradient.double() * (rectified > 0) * factor
    emulate(sum_launch(gradient, partials, summed, rectified=rectified, variance=variance, scale=scale))
    assert_near(gradient, exact, 5e-3)
    assert_near(partials.double().sum((0, 1)), exact.sum((0, 2, 3)), 1e-5)


# more pixels than a block of the compressor and than a tile of the sums; features far from zero
@pytest.mark.parametrize(("n", "width", "capability"), [(2, 16, 90), (3, 6, 80)])
def test_batch_norm(n, width, capability):
    c, h, w, layers = 24, 23, 19, make_layers(width, 9, batch=True)
    x, pixels = draw(n, c, h, w, offset=2.0), n * h * w
    x[:, :, ::7] *= 8
    weight, bias = 0.2 * draw(width, c, 1, 1, dtype=FLOAT), draw(width, dtype=FLOAT, offset=20.0)
    scale, shift = draw(width, dtype=FLOAT), draw(width)
    encoder = draw(9, width, 3, 3, dtype=FLOAT)
    mean, variance, batches = draw(width, dtype=FLOAT), draw(width, dtype=FLOAT).abs(), torch.tensor(41)
    parameters = Parameters(weight, bias, mean, variance, scale, shift, encoder, draw(9, dtype=FLOAT))
    features, normalized = (empty(n, width, h, w, dtype=HALF).contiguous(memory_format=LAST) for _ in range(2))
    partials, statistics = empty(2, width, feature_blocks(pixels)[0]), empty(2, width)
    copy, kept = empty(layers.copied, dtype=HALF), empty(layers.kept + width * c, dtype=HALF)
    norm = torch.nn.BatchNorm2d(width, eps=layers.eps, momentum=layers.momentum).double()
    norm.load_state_dict({"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance, "num_batches_tracked": batches})

    emulate(compress_launch(x, features, copy, parameters, layers, kept, partials), capability)
    assert_near(features, F.conv2d(x.double(), weight.double(), bias.double()), 2e-3)
    rows = torch.cat([encoder, torch.zeros(layers.kept_rows - 9, width, 3, 3)])
    assert torch.equal(kept, torch.cat([rows.permute(0, 2, 3, 1).flatten(), weight.flatten()]).half())
    given = features.double().requires_grad_()
    exact = norm(given).relu()
    emulate(combine_launch(pixels, partials, statistics, (mean, variance, batches), layers), capability)
    for value, expected in zip((mean, variance, batches), norm.buffers(), strict=True):
        assert_near(value, expected, 1e-6)
    assert batches == 42
    emulate(normalize_launch(features, statistics, scale, shift, normalized, layers), capability)
    assert_near(normalized, exact, 1e-3)

    gradient, summed = draw(n, width, h, w, offset=0.5), Summed(width, width, True, False, True, 0.0)
    # the kernels see the derivative of the ReLU where the rounded result has it
    mask = (normalized > 0).double()
    expected = torch.autograd.grad(norm(given), [given, norm.weight, norm.bias], gradient.double() * mask)
    partials = partials_of(gradient, summed)
    launch = sum_launch(gradient, partials, summed, rectified=normalized, features=features, statistics=statistics)
    emulate(launch, capability)
    assert_near(partials.double().sum(1)[0, :width], expected[2], 1e-6)
    assert_near(partials.double().sum(1)[1, :width], expected[1], 1e-5)
    emulate(differentiate_launch(gradient, normalized, features, statistics, scale, partials, layers), capability)
    assert_near(gradient, expected[0], 1e-3)


def test_batch_norm_in_two_blocks_of_channels():
    width, layers = 136, make_layers(136, 9, batch=True)
    features, gradient, scale, shift = draw(1, width, 7, 9, offset=1.0), draw(1, width, 9, 7).mT, draw(width), draw(width, offset=0.5)
    gradient = gradient.contiguous(memory_format=LAST)
    statistics = torch.stack([features.float().mean((0, 2, 3)), (features.float().var((0, 2, 3), correction=0) + layers.eps).rsqrt()])
    normalized = empty(1, width, 7, 9, dtype=HALF).contiguous(memory_format=LAST)
    emulate(normalize_launch(features, statistics, scale, shift, normalized, layers))
    given, summed = features.double().requires_grad_(), Summed(width, width, True, False, True, 0.0)
    exact = F.batch_norm(given, None, None, scale.double(), shift.double(), True, 0.0, layers.eps)
    assert_near(normalized, exact.relu(), 1e-3)
    expected = torch.autograd.grad(exact, given, gradient.double() * (normalized > 0))[0]
    partials = partials_of(gradient, summed)
    emulate(sum_launch(gradient, partials, summed, rectified=normalized, features=features, statistics=statistics))
    emulate(differentiate_launch(gradient, normalized, features, statistics, scale, partials, layers))
    assert_near(gradient, expected, 1e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("batch", [False, True])
def test_gradients_of_parameters(batch, memory_format):
    width, outputs, c, layers = 20, 27, 12, make_layers(20, 27, batch=batch)
    encoder, compressor = draw(layers.kept_rows, width, 3, 3, dtype=BF16), draw(width, c, dtype=BF16)
    partials, feature_partials = draw(1, 130, 64, dtype=FLOAT), draw(1 + batch, 70, 32, dtype=FLOAT)
    shapes = (width, c, 1, 1), (width,), (width,), (width,), (outputs, width, 3, 3), (outputs,)
    gradients = [empty(*shape).contiguous(memory_format=memory_format if len(shape) == 4 else torch.contiguous_format) for shape in shapes]
    if not batch:
        gradients[2:4] = None, None
    emulate(finish_launch(gradients, encoder, compressor, partials, feature_partials, layers))
    weight, bias, scale, shift, encoder_weight, encoder_bias = gradients
    assert torch.equal(weight.flatten(1), compressor.float())
    assert torch.equal(encoder_weight, encoder[:outputs].float())
    assert_near(encoder_bias, partials[0, :, :outputs].double().sum(0), 1e-6)
    sums = feature_partials[..., :width].double().sum(1)
    if batch:
        # that of the bias is exact
        assert not bias.any()
        assert_near(shift, sums[0], 1e-6)
        assert_near(scale, sums[1], 1e-6)
    else:
        assert_near(bias, sums[0], 1e-6)


def test_frozen_parameters_have_no_gradients():
    layers = make_layers(16, 25)
    partials = draw(1, 8, 64, dtype=FLOAT)
    bias = empty(25)
    emulate(finish_launch([None] * 5 + [bias], None, None, partials, None, layers))
    assert_near(bias, partials[0, :, :25].double().sum(0), 1e-6)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_loads_are_wide_and_nothing_spills(capability):
    """The kernels of 64 images of 64 x 112 x 112, whose norm has 16 channels, and of 4 of 256 x 100 x 168 without a norm."""
    layers = make_layers(16, 25, batch=True)
    gradient, features = (torch.empty(64, 16, 112, 112, dtype=BF16, device="meta").contiguous(memory_format=LAST) for _ in range(2))
    dlogits = torch.empty(4, 112, 100, 168, dtype=BF16, device="meta").contiguous(memory_format=LAST)
    channels, statistics = empty(16, device="meta"), empty(2, 16, device="meta")
    summed, summed_logits = Summed(16, 16, True, False, True, 0.0), Summed(112, 100, False, False, False, 0.0)
    partials, pixels = partials_of(gradient, summed), 64 * 112 * 112
    blocks = empty(2, 16, feature_blocks(pixels)[0], device="meta")
    vectors = [empty(16, device="meta") for _ in range(3)]
    parameters = empty(16, 64, 1, 1, device="meta"), *vectors, empty(25, 16, 3, 3, device="meta"), empty(25, device="meta")
    batches = torch.empty((), dtype=torch.int64, device="meta")
    encoder, compressor = empty(64, 16, 3, 3, dtype=BF16, device="meta"), empty(16, 64, dtype=BF16, device="meta")
    for launch, width in (
        (sum_launch(dlogits, partials_of(dlogits, summed_logits), summed_logits), 64),
        (sum_launch(gradient, partials, summed, rectified=gradient, features=features, statistics=statistics), 128),
        (combine_launch(pixels, blocks, statistics, (channels, channels, batches), layers), 32),
        (normalize_launch(features, statistics, channels, channels, gradient, layers), 128),
        (differentiate_launch(gradient, features, features, statistics, channels, partials, layers), 128),
        (finish_launch(parameters, encoder, compressor, partials, partials, layers), 32),
    ):
        code = read_assembly(compile_launch(launch, capability))
        assert not code.spills
        assert code.blocks >= 2
        assert code.widest_load >= width
