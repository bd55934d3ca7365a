"""The kernels of the module's training as compiled code: right results in an emulator, wide loads, no spills."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.layer.batch_norm import combine_launch, differentiate_launch
from carafepp.kernels.gpu.layer.encoder import Layers, Parameters, compress_launch, encode_launch, feature_blocks
from carafepp.kernels.gpu.layer.encoder_gradient import Division, Norm, encoder_gradient_launch
from carafepp.kernels.gpu.layer.sums import finish_launch
from ptx_step import emulate

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
LAST = torch.channels_last


def make_layers(width, outputs, kernel=3, *, stride=1, dilation=1, batch=False, rectified=None):
    normalized = True if rectified is None else rectified
    padding = kernel // 2 * dilation
    geometry = (kernel, kernel, stride, stride, padding, padding, dilation, dilation)
    rows = -(-outputs // 16) * 16
    return Layers(True, normalized, normalized, 1e-3, width, outputs, rows, *geometry, batch, 0.25, 2 * rows)


def draw(*size, dtype=HALF, offset=0.0):
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64) + offset
    return drawn.to(dtype, memory_format=LAST) if len(size) == 4 else drawn.to(dtype)


def empty(*size, dtype=FLOAT, device="cpu"):
    return torch.full(size, math.nan, dtype=dtype, device=device)


def assert_near(value, exact, tolerance):
    assert ((value.double() - exact).abs().max() / exact.abs().max()).item() < tolerance


def empty_map(*size, dtype=HALF, device="cpu"):
    return empty(*size, dtype=dtype, device=device).contiguous(memory_format=LAST)


def make_step(size, layers, *, dtype=HALF, given=FLOAT):
    """Return the gradient of the logits, with garbage after the outputs, the kept weight, features, the norm, and the encoder's weight."""
    n, h, w = size
    sides = [-(-side // stride) for side, stride in ((h, layers.stride_h), (w, layers.stride_w))]
    dlogits = draw(n, layers.kept_rows, *sides, dtype=dtype, offset=0.5)
    dlogits[:, layers.outputs :] = math.nan
    weight = draw(layers.outputs, layers.width, layers.kernel_h, layers.kernel_w, dtype=dtype)
    kept = torch.full((layers.kept_rows, layers.kernel_h, layers.kernel_w, layers.width), math.nan, dtype=dtype)
    kept[: layers.outputs] = weight.permute(0, 2, 3, 1)
    features = draw(n, layers.width, h, w, dtype=dtype, offset=0.3)
    if layers.rectified and not layers.batch:
        features = features.relu()
    norm = Norm(*(draw(layers.width, dtype=given, offset=offset) for offset in (0.0, 0.5, 0.2))) if layers.normalized else Norm(*[None] * 3)
    return dlogits, kept, features, norm._replace(variance=norm.variance.abs() + 0.5) if layers.normalized else norm, weight


def partials_of(size, layers, device="cpu"):
    division = Division(
        size, tuple(-(-side // stride) for side, stride in zip(size[1:], (layers.stride_h, layers.stride_w), strict=True)), layers
    )
    return empty(*division.logit_partials, device=device), empty(*division.partials, device=device)


def differentiate(features, weight, dlogits, layers):
    """Return the gradient of the encoder to what it reads, in float64."""
    read = features.double().requires_grad_()
    pairs = [(getattr(layers, f"{name}_h"), getattr(layers, f"{name}_w")) for name in ("stride", "padding", "dilation")]
    logits = F.conv2d(read, weight.double(), None, *pairs)
    return torch.autograd.grad(logits, read, dlogits[:, : layers.outputs].double())[0]


GEOMETRIES = [
    # two blocks of columns and of depth, and of each in one
    ((1, 5, 7), {"width": 144, "outputs": 100, "rectified": False, "dtype": BF16}, 90),
    # other classes of pixels at the last row and column, and a block that is not full
    ((2, 9, 11), {"width": 16, "outputs": 25, "stride": 2, "dtype": BF16}, 80),
    ((1, 8, 7), {"width": 6, "outputs": 27, "stride": 3, "kernel": 5, "rectified": False}, 90),
    # classes without any tap
    ((1, 9, 6), {"width": 5, "outputs": 9, "stride": 2, "dilation": 2, "rectified": False}, 80),
    ((1, 1, 1), {"width": 16, "outputs": 16, "kernel": 1, "rectified": False}, 80),
]


@pytest.mark.parametrize(("size", "options", "capability"), GEOMETRIES, ids=str)
def test_gradient_of_the_encoder(size, options, capability):
    dtype = options.get("dtype", HALF)
    layers = make_layers(**{name: value for name, value in options.items() if name != "dtype"})
    dlogits, kept, features, norm, weight = make_step(size, layers, dtype=dtype)
    given, gradient, (logit_partials, partials) = dlogits.clone(), empty_map(*features.shape, dtype=dtype), partials_of(size, layers)
    emulate(encoder_gradient_launch(dlogits, kept, features, gradient, logit_partials, partials, norm, layers), capability)
    factor = 1.0
    if layers.normalized:
        factor = (norm.scale.double() / (norm.variance.double() + layers.eps).sqrt()).view(1, -1, 1, 1) * (features > 0)
    assert_near(gradient, differentiate(features, weight, given, layers) * factor, 2e-3 if dtype == HALF else 1e-2)
    assert_near(partials.double().sum((0, 1))[: layers.width], gradient.double().sum((0, 2, 3)), 1e-5)
    assert_near(logit_partials.double().sum((0, 1))[: layers.outputs], given[:, : layers.outputs].double().sum((0, 2, 3)), 1e-6)
    assert torch.equal(dlogits[:, : layers.outputs], given[:, : layers.outputs])
    assert not dlogits[:, layers.outputs :].any()


def test_gradient_without_a_compressor_is_added():
    layers = make_layers(24, 9, stride=2, rectified=False)._replace(compressed=False)
    dlogits, kept, x, norm, weight = make_step((2, 5, 6), layers)
    given, gradient, (logit_partials, _) = dlogits.clone(), draw(2, 24, 5, 6, offset=1.0), partials_of((2, 5, 6), layers)
    exact = gradient.double() + differentiate(x, weight, given, layers)
    emulate(encoder_gradient_launch(dlogits, kept, x, gradient, logit_partials, None, norm, layers))
    assert_near(gradient, exact, 2e-3)


def test_sums_without_the_gradient():
    layers = make_layers(16, 25, rectified=False)
    dlogits, kept, features, norm, _ = make_step((1, 5, 6), layers)
    logit_partials, partials = partials_of((1, 5, 6), layers)
    emulate(encoder_gradient_launch(dlogits, kept, features, None, logit_partials, partials, norm, layers))
    assert_near(logit_partials.double().sum((0, 1))[:25], dlogits[:, :25].double().sum((0, 2, 3)), 1e-6)
    assert not dlogits[:, 25:].any()
    assert partials.isnan().all()


# more pixels than a block of the compressor and than a tile of the sums; features far from zero; two blocks of channels
@pytest.mark.parametrize(
    ("n", "width", "outputs", "stride", "capability"), [(2, 16, 9, 2, 90), (3, 6, 9, 1, 80), (1, 136, 9, 1, 80), (1, 16, 100, 1, 90)]
)
def test_batch_norm(n, width, outputs, stride, capability):
    c, h, w, layers = 24, *((23, 19) if width < 100 > outputs else (9, 7)), make_layers(width, outputs, stride=stride, batch=True)
    x, pixels = draw(n, c, h, w, offset=2.0), n * h * w
    x[:, :, ::7] *= 8
    weight, bias = 0.2 * draw(width, c, 1, 1, dtype=FLOAT), draw(width, dtype=FLOAT, offset=20.0)
    scale, shift = draw(width, dtype=FLOAT), draw(width)
    encoder, encoder_bias = draw(outputs, width, 3, 3, dtype=FLOAT), draw(outputs, dtype=FLOAT)
    mean, variance, batches = draw(width, dtype=FLOAT), draw(width, dtype=FLOAT).abs(), torch.tensor(41)
    parameters = Parameters(weight, bias, mean, variance, scale, shift, encoder, encoder_bias)
    features, normalized, gradient = (empty_map(n, width, h, w) for _ in range(3))
    partials, statistics = empty(2, width, feature_blocks(pixels)[0]), empty(2, width)
    copy, kept = empty(layers.copied, dtype=HALF), empty(layers.kept + width * c, dtype=HALF)
    norm = torch.nn.BatchNorm2d(width, eps=layers.eps, momentum=layers.momentum).double()
    norm.load_state_dict({"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance, "num_batches_tracked": batches})

    emulate(compress_launch(x, features, copy, parameters, layers, kept, partials), capability)
    assert_near(features, F.conv2d(x.double(), weight.double(), bias.double()), 2e-3)
    rows = torch.cat([encoder, torch.zeros(layers.kept_rows - outputs, width, 3, 3)])
    assert torch.equal(kept, torch.cat([rows.permute(0, 2, 3, 1).flatten(), weight.flatten()]).half())
    given = features.double().requires_grad_()
    exact = norm(given).relu()
    emulate(combine_launch(pixels, partials, statistics, (mean, variance, batches), layers), capability)
    for value, expected in zip((mean, variance, batches), norm.buffers(), strict=True):
        assert_near(value, expected, 1e-6)
    assert batches == 42
    logits = empty_map(n, layers.row, -(-h // stride), -(-w // stride))
    emulate(encode_launch(features, copy, logits, parameters, layers, statistics), capability)
    assert_near(logits[:, :outputs], F.conv2d(exact, encoder.double(), encoder_bias.double(), stride, 1), 3e-3)

    dlogits = draw(n, layers.kept_rows, *logits.shape[2:], offset=0.5)
    logit_partials, partials = partials_of((n, h, w), layers)
    tensors = dlogits, kept, features, gradient, logit_partials, partials, Norm(None, scale, shift)
    emulate(encoder_gradient_launch(*tensors, layers, statistics, normalized), capability)
    assert_near(normalized, exact, 1e-3)
    # the kernels see the derivative of the ReLU where the rounded result has it
    expected = differentiate(normalized, encoder.half(), dlogits, layers) * (normalized > 0)
    assert_near(gradient, expected, 2e-3)
    expected = torch.autograd.grad(norm(given), [given, norm.weight, norm.bias], gradient.double())
    assert_near(partials.double().sum(1)[0, :width], expected[2], 1e-5)
    assert_near(partials.double().sum(1)[1, :width], expected[1], 1e-5)
    emulate(differentiate_launch(gradient, features, statistics, scale, partials, layers), capability)
    assert_near(gradient, expected[0], 1e-3)


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

    def map_of(*size):
        return empty_map(*size, dtype=BF16, device="meta")

    def vectors(*sizes):
        return [empty(size, device="meta") for size in sizes]

    layers, wide = make_layers(16, 25, stride=2, batch=True), make_layers(64, 100, rectified=False)
    layers, wide = layers._replace(kept_rows=64), wide._replace(kept_rows=112)
    gradient, features, normalized = (map_of(64, 16, 112, 112) for _ in range(3))
    statistics, pixels = empty(2, 16, device="meta"), 64 * 112 * 112
    (logit_partials, partials), (wide_logit_partials, wide_partials) = (
        partials_of(size, own, device="meta") for size, own in (((64, 112, 112), layers), ((4, 100, 168), wide))
    )
    blocks = empty(2, 16, feature_blocks(pixels)[0], device="meta")
    running = *vectors(16, 16), torch.empty((), dtype=torch.int64, device="meta")
    norm = Norm(None, *vectors(16, 16))
    encoder, compressor = (torch.empty(*size, dtype=BF16, device="meta") for size in ((64, 16, 3, 3), (16, 64)))
    gradients = empty(16, 64, 1, 1, device="meta"), *vectors(16, 16, 16), empty(25, 16, 3, 3, device="meta"), *vectors(25)
    read = map_of(64, 64, 56, 56), encoder, features, gradient, logit_partials, partials
    parameters = Parameters(*[None] * 4, norm.scale, norm.shift, gradients[4], gradients[5])
    copy = torch.empty(layers.copied, dtype=BF16, device="meta")
    wide_kept = torch.empty(wide.kept, dtype=BF16, device="meta")
    wide_read = map_of(4, 112, 100, 168), wide_kept, map_of(4, 64, 100, 168), map_of(4, 64, 100, 168), wide_logit_partials, wide_partials
    for launch, load, products in (
        (encoder_gradient_launch(*wide_read, Norm(None, None, None), wide), 128, True),
        (encoder_gradient_launch(*read, norm, layers, statistics, normalized), 128, True),
        (encode_launch(features, copy, map_of(64, 32, 56, 56), parameters, layers, statistics), 128, True),
        (combine_launch(pixels, blocks, statistics, running, layers), 32, False),
        (differentiate_launch(gradient, features, statistics, norm.scale, partials, layers), 128, False),
        (finish_launch(gradients, encoder, compressor, logit_partials, partials, layers), 32, False),
    ):
        code = read_assembly(compile_launch(launch, capability))
        assert not code.spills
        assert code.blocks >= 2
        assert code.widest_load >= load
        assert bool(sum(code.tensor_core.values())) == products
