"""The CARAFE++ module: the paper's equations, mmcv's state dict, any size, wrong arguments."""

import itertools
import pickle
import re
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from carafepp.models.carafe import CARAFE
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import count_parameters, small_resnet
from torchvision.models.feature_extraction import create_feature_extractor


def carafe_by_the_paper(module, x):
    """Equations 1 to 3 one target location at a time, from the module's weights and options."""
    k, up, down, groups, *_ = module.spec
    encoder, r = module.content_encoder, k // 2
    compressed = F.conv2d(x, module.channel_compressor.weight, module.channel_compressor.bias)
    encoded = F.conv2d(compressed, encoder.weight, encoder.bias, stride=down, padding=encoder.padding, dilation=encoder.dilation)
    n, c, h, w = x.shape
    y = x.new_zeros(n, c, -(-h // down) * up, -(-w // down) * up)
    for b, ch, i2, j2 in itertools.product(range(n), range(c), range(y.shape[2]), range(y.shape[3])):
        i, j = (i2 // up, j2 // up) if up > 1 else (i2 * down, j2 * down)
        # depth to space: channel = m * up**2 + dy * up + dx
        phase = (i2 % up) * up + j2 % up
        first = (ch * groups // c) * k * k
        logits = encoded[b, phase :: up * up, i2 // up, j2 // up][first : first + k * k]
        kernel = logits.softmax(0).view(k, k)
        for dy, dx in itertools.product(range(-r, r + 1), range(-r, r + 1)):
            if 0 <= i + dy < h and 0 <= j + dx < w:
                y[b, ch, i2, j2] += kernel[dy + r, dx + r] * x[b, ch, i + dy, j + dx]
    return y


@pytest.mark.parametrize(
    "options",
    [{"up": 2}, {"down": 2}, {"up": 3, "kernel_size": 3}, {"down": 2, "groups": 2, "encoder_dilation": 2, "encoder_kernel": 5}],
    ids=str,
)
def test_carafe_is_the_papers_equations(options):
    torch.manual_seed(0)
    module = CARAFE(4, compressed_channels=3, **options).double()
    torch.nn.init.normal_(module.content_encoder.weight)  # far from the box blur it starts as
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(module(x), carafe_by_the_paper(module, x))


def test_carafe_has_the_keys_parameters_and_initialisation_of_mmcv():
    module = CARAFE(256, up=2)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "channel_compressor.weight": (64, 256, 1, 1),
        "channel_compressor.bias": (64,),
        "content_encoder.weight": (100, 64, 3, 3),
        "content_encoder.bias": (100,),
    }
    assert count_parameters(module) == 74_148
    assert 0.0009 < module.content_encoder.weight.std() < 0.0011
    bound = (6 / (256 + 64)) ** 0.5  # Xavier's for a 1x1 convolution
    assert 0.95 * bound < module.channel_compressor.weight.abs().max() <= bound
    assert not module.channel_compressor.bias.any()
    assert not module.content_encoder.bias.any()


def test_carafe_compresses_to_the_papers_widths():
    assert CARAFE(256, up=2).content_encoder.in_channels == 64
    assert CARAFE(256, down=2).content_encoder.in_channels == 16
    assert CARAFE(256, down=2, compressed_channels=None).content_encoder.in_channels == 256


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2]))
def test_carafe_sizes(height, width, up, down, kernel_size, groups):
    module = CARAFE(4, up=up, down=down, kernel_size=kernel_size, groups=groups, compressed_channels=2)
    x = torch.randn(1, 4, height, width)
    size = -(-height * up // down), -(-width * up // down)
    assert module(x).shape == (1, 4, *size)
    kernels = module.kernels(x)
    assert kernels.shape == (1, groups, kernel_size, kernel_size, *size)
    torch.testing.assert_close(kernels.sum((2, 3)), torch.ones(1, groups, *size))


def test_carafe_kernels_are_the_weights_it_sums_under():
    module = CARAFE(2, up=2, kernel_size=3)
    delta = torch.zeros(1, 2, 6, 7)
    delta[..., 3, 4] = 1.0
    kernels = module.kernels(delta)
    torch.testing.assert_close(module(delta)[0, 0, 6:8, 8:10], kernels[0, 0, 1, 1, 6:8, 8:10])
    torch.testing.assert_close(module(delta)[0, 0, 4:6, 8:10], kernels[0, 0, 2, 1, 4:6, 8:10])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd"),
        ({"encoder_kernel": 2}, ValueError, "encoder_kernel must be odd.*got 2"),
        ({"up": 0}, ValueError, "up must be at least 1, got 0"),
        ({"up": 2.0}, TypeError, "up must be an int, got 2.0"),
        ({"groups": 3}, ValueError, "groups=3 for channels=8"),
        ({"compressed_channels": 0}, ValueError, "compressed_channels must be at least 1"),
        ({"compressed_channels": "all"}, TypeError, "compressed_channels must be an int.*'all'"),
        ({"normalizer": "tanh"}, ValueError, "softmax, sigmoid, sigmoid_normalized, none.*'tanh'"),
        ({"compressor_norm": True, "compressed_channels": None}, ValueError, "compressor_norm"),
        ({"encoder_dilation": 0}, ValueError, "encoder_dilation must be at least 1"),
    ],
    ids=str,
)
def test_carafe_names_a_wrong_argument(options, error, message):
    with pytest.raises(error, match=message):
        CARAFE(8, **options)


@pytest.mark.parametrize("options", [{}, {"compressed_channels": None}], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (8, 5, 7), (1, 8, 2, 5, 7)], ids=str)
def test_carafe_names_features_of_another_shape(options, shape):
    module = CARAFE(8, up=2, **options)
    with pytest.raises(ValueError, match=re.escape(f"x must have the shape [N, 8, H, W], got {shape}")):
        module.kernels(torch.rand(shape))
    with pytest.raises(ValueError, match=rf"x must have .*, got .*{re.escape(str(shape))}"):
        module(torch.rand(shape))
    with pytest.raises(TypeError, match=r"x must be a tensor \[N, 8, H, W\], got an object of type list"):
        module([1.0])


def test_carafe_takes_the_channels_of_a_layer_that_replaces_its_own():
    module = CARAFE(8, up=2)
    module.channel_compressor = nn.Conv2d(6, 64, 1)
    assert module(torch.rand(1, 6, 5, 7)).shape == (1, 6, 10, 14)
    module.channel_compressor = nn.Sequential(module.channel_compressor, nn.ReLU())
    assert module(torch.rand(1, 6, 5, 7)).shape == (1, 6, 10, 14)


@pytest.mark.parametrize("options", [{"up": 2}, {"down": 2, "compressor_norm": True}, {"up": 3, "down": 2, "groups": 2}], ids=str)
def test_torch_fx_traces_the_module(options):
    module = CARAFE(8, **options).eval()
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(module)))
    assert "reassemble" in [node.name for node in traced.graph.nodes]
    for size in ((5, 7), (4, 4)):
        x = torch.randn(2, 8, *size)
        assert torch.equal(traced(x), module(x))


def test_features_of_a_network_are_extracted():
    network = small_resnet(downsample=partial(CARAFE, down=2, kernel_size=3)).eval()
    x = torch.randn(1, 3, 64, 64)
    features = create_feature_extractor(network, {"layer2": "c3", "layer4": "c5"})(x)
    _, c3, _, c5 = network(x)
    assert torch.equal(features["c3"], c3)
    assert torch.equal(features["c5"], c5)
