"""Deformable convolutions, alone and in a ResNet."""

import pytest
import torch
from carafepp.models.carafe import CARAFE
from carafepp.models.deform import DeformConv
from carafepp.models.resnet import resnet50
from carafepp.tasks.runs import count_flops
from networks import NORMED_CARAFE, small_resnet
from torch import nn


def test_deformable_convolutions_stand_where_the_paper_has_them():
    def deformed(net):
        return [name for name, module in net.named_modules() if isinstance(module, DeformConv)]

    every = [f"layer{layer}.{block}.conv2" for layer, depth in ((2, 4), (3, 6), (4, 3)) for block in range(depth)]
    with torch.device("meta"):
        assert deformed(resnet50(deformable=(2, 3, 4))) == every
        sampled = resnet50(deformable=(2, 3, 4), downsample=NORMED_CARAFE)
    assert deformed(sampled) == [name for name in every if ".0." not in name]
    assert sampled.layer2[0].conv2.stride == (1, 1)
    assert isinstance(sampled.layer2[0].sampler, CARAFE)


def test_deformable_convolution_starts_as_half_a_plain_one_and_learns_offsets():
    torch.manual_seed(0)
    layer = DeformConv(4, 6, stride=2)
    x = torch.randn(2, 4, 7, 5)
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, layer.weight, stride=2, padding=1) / 2)
    y.square().sum().backward()
    assert layer.conv_offset.weight.grad.abs().max() > 0


def test_deformable_convolution_counts_as_two_convolutions():
    layer = DeformConv(4, 6).to("meta")
    assert count_flops(layer, torch.rand(4, 8, 8, device="meta")) == 2 * 64 * 9 * 4 * (27 + 6)


def test_deformable_resnet_has_the_sizes_of_the_plain_one():
    x = torch.randn(2, 3, 61, 39)
    plain = small_resnet()(x)
    for sampler in (None, NORMED_CARAFE):
        levels = small_resnet(downsample=sampler, deformable=(2, 3, 4))(x)
        assert [level.shape for level in levels] == [level.shape for level in plain]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_on_a_cpu(dtype, autocast):
    torch.manual_seed(0)
    layer = DeformConv(4, 6)
    nn.init.normal_(layer.conv_offset.weight, std=0.1)
    x = torch.randn(2, 4, 7, 5)
    expected = layer(x)
    layer = layer if autocast else layer.to(dtype)
    x = (x if autocast else x.to(dtype)).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = layer(x)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)
    y.sum().backward()
    for tensor in (x, layer.weight, layer.conv_offset.weight):
        assert tensor.grad.abs().sum() > 0
