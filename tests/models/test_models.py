"""The CARAFE++ module and the networks with their sampler slots."""

import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from carafepp.models.carafe import CARAFE
from carafepp.models.resnet import ResNet, resnet50, resnet101, tiny
from carafepp.models.samplers import AvgPool, Bilinear, MaxPool, Nearest
from carafepp.models.upernet import UperNet
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def carafe_by_the_paper(module, x):
    """Equations 1 to 3 one target location at a time, from the module's weights and options."""
    k, up, down, groups, _ = module.spec
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
    assert count(module) == 74_148
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


def test_resnet50_is_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=10).eval()
    ours = resnet50(num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 65, 47)
    torch.testing.assert_close(ours(x), theirs(x))
    assert resnet101(num_classes=10).state_dict().keys() == torchvision.models.resnet101(num_classes=10).state_dict().keys()


def test_resnet_initialises_as_torchvision_does():
    torch.manual_seed(0)
    theirs = dict(torchvision.models.resnet50(zero_init_residual=True).named_parameters())
    ours = dict(resnet50(num_classes=1000, zero_init_residual=True).named_parameters())
    assert 0.0099 < ours.pop("fc.weight").std() < 0.0101  # of Goyal et al.
    assert not ours.pop("fc.bias").any()
    for name, parameter in ours.items():
        expected = theirs[name]
        assert abs(parameter.std() - expected.std()) <= 0.1 * expected.std(), name
        assert abs(parameter.mean() - expected.mean()) <= 0.01, name


@pytest.mark.parametrize(("norm", "added"), [(False, 69_519), (True, 69_743)])
def test_seven_carafe_add_their_parameters_to_resnet50(norm, added):
    sampled = resnet50(downsample=partial(CARAFE, down=2, compressor_norm=norm))
    assert sum(isinstance(module, CARAFE) for module in sampled.modules()) == 7
    assert count(sampled) - count(resnet50()) == added
    # the network's own layers keep their names, so that published weights load beside the samplers
    assert set(resnet50().state_dict()) <= set(sampled.state_dict())


def test_samplers_keep_their_initialisation_inside_networks():
    net = UperNet(tiny(downsample=partial(CARAFE, down=2)), 3, fpn=partial(CARAFE, up=2), fpn_dim=8, ppm_dim=8)
    encoders = [module.content_encoder for module in net.modules() if isinstance(module, CARAFE)]
    assert len(encoders) == 7 + 3
    assert all(encoder.weight.std() < 0.0015 for encoder in encoders)


def test_tiny_is_small():
    assert 400_000 < count(tiny()) < 600_000


def small_resnet(**options):
    return ResNet((1, 1, 1, 1), width=4, **options)


@pytest.mark.parametrize("deep_stem", [False, True])
@pytest.mark.parametrize("sampler", [partial(CARAFE, down=2), MaxPool, AvgPool], ids=["carafe", "max_pool", "avg_pool"])
@pytest.mark.parametrize("size", [(64, 64), (61, 39), (33, 1)], ids=str)
def test_sampled_resnet_has_the_sizes_of_the_published_one(size, sampler, deep_stem):
    x = torch.randn(2, 3, *size)
    published = small_resnet(deep_stem=deep_stem)(x)
    sampled = small_resnet(deep_stem=deep_stem, downsample=sampler)(x)
    assert [level.shape for level in sampled] == [level.shape for level in published]
    assert [level.shape[1] for level in sampled] == small_resnet().out_channels
    assert sampled[3].shape[2:] == (-(-size[0] // 32), -(-size[1] // 32))


def test_sampled_bottleneck_samples_before_both_convolutions():
    """Stride 1 after a sampler that drops every other pixel is stride 2 for the 1x1 of the shortcut."""

    class Subsample(torch.nn.Module):
        def forward(self, x):
            return x[..., ::2, ::2]

    published = small_resnet().eval()
    sampled = small_resnet(downsample=lambda channels: Subsample()).eval()
    sampled.load_state_dict(published.state_dict())
    x = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(sampled.layer2[0].downsample(sampled.layer2[0].shortcut_sampler(x)), published.layer2[0].downsample(x))
    assert sampled.layer2[0].conv2.stride == sampled.layer2[0].downsample[0].stride == (1, 1)
    channels = []
    small_resnet(downsample=lambda c: channels.append(c) or Subsample())
    assert channels == [4, 8, 16, 16, 32, 32, 64]


SLOTS = [None, Nearest, partial(CARAFE, up=2, compressed_channels=4)]


@pytest.mark.parametrize("fuse", SLOTS, ids=["published", "nearest", "carafe"])
@pytest.mark.parametrize("fpn", SLOTS, ids=["published", "nearest", "carafe"])
@pytest.mark.parametrize("ppm", SLOTS, ids=["published", "nearest", "carafe"])
def test_upernet_trains_with_every_combination_of_slots(ppm, fpn, fuse):
    net = UperNet(small_resnet(), 3, ppm=ppm, fpn=fpn, fuse=fuse, fpn_dim=4, ppm_dim=4)
    logits = net(torch.randn(2, 3, 69, 45))
    assert logits.shape == (2, 3, 18, 12)
    logits.logsumexp(1).mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_upernet_slots_get_the_channels_of_their_place():
    seen = {"ppm": [], "fpn": [], "fuse": []}
    slots = {name: lambda c, into=into: into.append(c) or Bilinear(c) for name, into in seen.items()}
    UperNet(small_resnet(), 3, fpn_dim=8, ppm_dim=4, **slots)
    assert seen == {"ppm": [128] * 4, "fpn": [8] * 3, "fuse": [8, 16, 24]}


def test_upernet_fpn_with_bilinear_is_the_published_one():
    """At sizes that are multiples of 32, twice as large bilinearly is what the published FPN does."""
    torch.manual_seed(0)
    published = UperNet(small_resnet(), 3, fpn_dim=8, ppm_dim=4).eval()
    sampled = UperNet(published.backbone, 3, fpn=Bilinear, fpn_dim=8, ppm_dim=4).eval()
    sampled.load_state_dict(published.state_dict())
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(sampled(x), published(x))


def test_upernet_has_the_authors_decoder():
    """Keys and shapes of the decoder that the authors published weights for."""
    shapes = {name: tuple(tensor.shape) for name, tensor in UperNet(resnet50(), 150).state_dict().items()}
    for name, shape in {
        "ppm_conv.3.0.weight": (512, 2048, 1, 1),
        "ppm_last_conv.0.weight": (512, 4096, 3, 3),
        "fpn_in.0.0.weight": (512, 256, 1, 1),
        "fpn_in.2.0.weight": (512, 1024, 1, 1),
        "fpn_out.2.0.0.weight": (512, 512, 3, 3),
        "conv_last.0.0.weight": (512, 2048, 3, 3),
        "conv_last.1.weight": (150, 512, 1, 1),
        "conv_last.1.bias": (150,),
    }.items():
        assert shapes[name] == shape, name


@pytest.fixture
def primary(tmp_path):
    """A primary configuration that chooses a model and what its slots follow, seen beside the package's groups."""
    (tmp_path / "primary.yaml").write_text(
        yaml.safe_dump(
            {
                "hydra": {"searchpath": ["pkg://carafepp.conf"]},
                "defaults": [
                    {"model": "upernet"},
                    {"backbone": "tiny"},
                    {"downsampler": "published"},
                    {"upsampler": "published"},
                    "_self_",
                ],
            }
        )
    )

    def build(*overrides):
        with initialize_config_dir(str(tmp_path), version_base=None):
            cfg = compose("primary", ["model.fpn_dim=8", "model.ppm_dim=8", *overrides])
        return instantiate(cfg.model)(num_classes=3)

    return build


def test_one_choice_fills_every_slot_with_its_options(primary):
    net = primary("upsampler=carafe", "upsampler.kernel_size=7", "downsampler=carafe", "downsampler.compressed_channels=8")
    up = [*net.ppm_up, *net.fpn_up, *net.fuse_up]
    assert [module.spec.kernel_size for module in up] == [7] * 10
    down = [module for module in net.backbone.modules() if isinstance(module, CARAFE)]
    assert [module.content_encoder.in_channels for module in down] == [8] * 7


def test_one_slot_alone(primary):
    net = primary("upsampler=carafe", "model.ppm=null", "model.fuse=null")
    assert list(net.ppm_up) == [None] * 4
    assert isinstance(net.fpn_up[0], CARAFE)
    assert net.fuse_up is None
    net = primary("upsampler@model.fpn=carafe", "upsampler@model.ppm=bilinear")
    assert net.fuse_up is None
    assert isinstance(net.ppm_up[0], Bilinear)
    assert isinstance(net.fpn_up[0], CARAFE)
    net = primary("upsampler=carafe", "upsampler@model.ppm=bilinear")
    assert isinstance(net.ppm_up[0], Bilinear)
    assert isinstance(net.fpn_up[0], CARAFE)


def test_published_leaves_slots_empty(primary):
    net = primary()
    assert net.fuse_up is None
    assert isinstance(net.backbone.maxpool, torch.nn.MaxPool2d)
    assert net.backbone.layer2[0].conv2.stride == (2, 2)


def test_models_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from carafepp.models.carafe import CARAFE\n"
        "from carafepp.models.resnet import tiny\n"
        "from carafepp.models.upernet import UperNet\n"
        "y = CARAFE(8, up=2)(torch.rand(1, 8, 3, 4)); y.sum().backward(); assert y.shape == (1, 8, 6, 8)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
