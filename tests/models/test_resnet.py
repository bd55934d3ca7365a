"""ResNet: torchvision's network, samplers instead of its strides, dilated stages, and the cost of samplers."""

from functools import partial

import pytest
import torch
import torch.nn as nn
import torchvision
from carafepp.models.carafe import CARAFE
from carafepp.models.resnet import ResNet, resnet50, resnet101, tiny
from carafepp.models.samplers import AvgPool, MaxPool
from carafepp.tasks.runs import count_flops
from networks import NORMED_CARAFE, count_parameters, dilated_resnet, small_resnet


def test_resnet50_is_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=10).eval()
    ours = resnet50(num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 65, 47)
    torch.testing.assert_close(ours(x), theirs(x))
    assert resnet101(num_classes=10).state_dict().keys() == torchvision.models.resnet101(num_classes=10).state_dict().keys()


def test_resnet_names_images_of_another_shape():
    network = tiny()
    for shape in ((2, 1, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match=rf"x must have the shape \[N, 3, H, W\], got \({shape[0]}, "):
            network(torch.rand(shape))
    for conv1 in (nn.Conv2d(4, 16, 7, 2, padding=3), nn.LazyConv2d(16, 7, 2, padding=3)):
        network.conv1 = conv1
        assert len(network(torch.rand(2, 4, 64, 64))) == 4


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
    assert count_parameters(sampled) - count_parameters(resnet50()) == added
    # the network's own layers keep their names, so that published weights load into a network with samplers
    assert set(resnet50().state_dict()) <= set(sampled.state_dict())


def test_tiny_is_small():
    assert 400_000 < count_parameters(tiny()) < 600_000


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


def cost(build, **options) -> tuple[int, float]:
    """Parameters and multiply-adds at 224 x 224."""
    with torch.device("meta"):
        net = build(num_classes=1000, **options)
        return count_parameters(net), count_flops(net, torch.rand(3, 224, 224)) / 2


@pytest.mark.parametrize(("build", "parameters", "multiply_adds"), [(resnet50, 25_557_032, 4.089e9), (resnet101, 44_549_160, 7.801e9)])
def test_seven_carafe_add_little_at_224(build, parameters, multiply_adds):
    assert cost(build) == (parameters, pytest.approx(multiply_adds, rel=1e-3))
    sampled = cost(build, downsample=NORMED_CARAFE)
    # 69,519 of compressors and encoders, and two for each of the 7 x 16 compressed channels of the norms
    assert sampled[0] - parameters == 69_519 + 2 * 7 * 16
    assert sampled[1] - cost(build)[1] == pytest.approx(83.5e6, rel=1e-3)


def test_dilated_backbone_keeps_weights_and_stays_at_stride_8():
    net = dilated_resnet()
    net.load_state_dict(ResNet((1, 2, 2, 2), width=4).state_dict())
    assert [tuple(level.shape[2:]) for level in net(torch.randn(2, 3, 61, 39))] == [(16, 10), (8, 5), (8, 5), (8, 5)]
    dilations = {name: module.dilation[0] for name, module in net.named_modules() if name.endswith("conv2")}
    assert dilations == {f"layer{i}.{block}.conv2": max(1, 2 ** (i - 2)) for i in (1, 2, 3, 4) for block in range(1 if i == 1 else 2)}


def test_dilated_layers_have_no_samplers_and_may_be_deformable():
    net = dilated_resnet(downsample=MaxPool, deformable=(3, 4))
    assert [name for name, module in net.named_modules() if isinstance(module, MaxPool)] == [
        "maxpool",
        "layer2.0.sampler",
        "layer2.0.shortcut_sampler",
    ]
    plain = dilated_resnet(downsample=MaxPool)
    assert [level.shape for level in net(torch.randn(1, 3, 45, 33))] == [level.shape for level in plain(torch.randn(1, 3, 45, 33))]
    # a deformable convolution starts as half the plain one, with the same dilation
    torch.manual_seed(0)
    x = torch.randn(1, 32, 9, 9)
    plain.layer4[1].conv2.load_state_dict({"weight": net.layer4[1].conv2.weight})
    torch.testing.assert_close(net.layer4[1].conv2(x), plain.layer4[1].conv2(x) / 2)


def test_output_stride_is_checked():
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        ResNet((1, 1, 1, 1), width=4, output_stride=4)
