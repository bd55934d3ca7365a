"""Partial convolutions by their definition, and masks through CARAFE++."""

from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from carafepp.kernels import reassemble_weights
from carafepp.models.carafe import CARAFE
from carafepp.models.learned_samplers import Deconv
from carafepp.models.partial_conv import PartialConv2d, PartialGlobalLocal, PartialSampler
from carafepp.models.samplers import AvgPool, Bilinear, Nearest
from networks import random_mask

DOWN, UP = partial(CARAFE, down=2), partial(CARAFE, up=2)


def fixed_carafe(channels: int, logits: torch.Tensor, **options) -> CARAFE:
    """A CARAFE that predicts the same `logits` [K * K * up**2] everywhere, for any input."""
    module = CARAFE(channels, **options)
    nn.init.zeros_(module.content_encoder.weight)
    module.content_encoder.bias.data.copy_(logits)
    return module.to(logits.dtype)


def lively_carafe(channels: int, **options) -> CARAFE:
    """A CARAFE in float64 whose kernels differ from place to place."""
    module = CARAFE(channels, **options).double()
    nn.init.normal_(module.content_encoder.weight, std=0.5)
    return module


@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation", "bias"), [(3, 1, 1, True), (3, 2, 1, False), (5, 1, 1, True), (3, 1, 2, True)]
)
def test_partial_convolution_equals_its_definition(kernel_size, stride, dilation, bias):
    torch.manual_seed(0)
    padding = dilation * (kernel_size // 2)
    conv = PartialConv2d(3, 2, kernel_size, stride, padding, dilation, bias=bias).double()
    x, known = torch.randn(1, 3, 9, 8, dtype=torch.double), random_mask(9, 8, share=0.1)
    y, updated = conv(x, known)
    assert 0 < updated.sum() < updated.numel()
    span = range(kernel_size)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            taps = [(i * stride + a * dilation - padding, j * stride + b * dilation - padding, a, b) for a in span for b in span]
            taps = [(r, c, a, b) for r, c, a, b in taps if 0 <= r < 9 and 0 <= c < 8 and known[0, 0, r, c]]
            assert updated[0, 0, i, j] == bool(taps)
            total = sum((conv.weight[:, :, a, b] @ x[0, :, r, c] for r, c, a, b in taps), torch.zeros(2, dtype=torch.double))
            expected = total * kernel_size**2 / len(taps) + (conv.bias if bias else 0) if taps else total
            torch.testing.assert_close(y[0, :, i, j], expected)


def test_partial_convolution_of_known_pixels_is_the_convolution():
    torch.manual_seed(0)
    conv = PartialConv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 8, 9)
    y, known = conv(x, torch.ones(2, 1, 8, 9))
    inner = ..., slice(1, -1), slice(1, -1)
    torch.testing.assert_close(y[inner], F.conv2d(x, conv.weight, conv.bias, padding=1)[inner])
    assert known.min() == 1


@pytest.mark.parametrize("options", [{"down": 2}, {"up": 2}, {"up": 3, "kernel_size": 3}, {"down": 2, "groups": 2}], ids=str)
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid_normalized"])
def test_known_images_are_plain_carafe(options, normalizer):
    torch.manual_seed(0)
    sampler = lively_carafe(8, **options, normalizer=normalizer).float()
    x = torch.randn(2, 8, 9, 11)
    y, known = PartialSampler(sampler)(x, torch.ones(2, 1, 9, 11))
    torch.testing.assert_close(y, sampler(x))
    assert known.min() == 1


@pytest.mark.parametrize("options", [{"down": 2}, {"up": 2}, {"up": 2, "kernel_size": 3, "groups": 2}], ids=str)
def test_mask_and_features_are_reassembled_with_the_same_kernels(options):
    torch.manual_seed(0)
    sampler = lively_carafe(4, **options)
    x, known = torch.randn(2, 4, 12, 13, dtype=torch.double), random_mask(12, 13, share=0.1).repeat(2, 1, 1, 1)
    y, updated = PartialSampler(sampler)(x, known)
    size, groups = sampler.spec.kernel_size, sampler.spec.groups
    weights = sampler.kernels(x * known).flatten(1, 3)
    scale = {"kernel_size": size, "up": sampler.spec.up, "down": sampler.spec.down, "groups": groups}
    inside = reassemble_weights(known.expand(-1, groups, -1, -1).contiguous(), weights, **scale)
    whole = reassemble_weights(torch.ones(2, groups, 12, 13, dtype=torch.double), weights, **scale)
    share = (inside / whole).repeat_interleave(4 // groups, 1)
    hole = inside[:, :1] == 0
    assert 0 < hole.sum() < hole.numel()
    assert torch.equal(updated, (~hole).double())
    expected = (reassemble_weights(x * known, weights, **scale) / share).masked_fill(hole, 0)
    torch.testing.assert_close(y, expected)


def test_equal_weights_average_the_known_pixels():
    x, known = torch.arange(81, dtype=torch.double).reshape(1, 1, 9, 9), torch.zeros(1, 1, 9, 9, dtype=torch.double)
    known[0, 0, 3, 3] = known[0, 0, 4, 5] = 1
    y, updated = PartialSampler(fixed_carafe(1, torch.zeros(25, dtype=torch.double), down=2))(x, known)
    assert y[0, 0, 2, 2].item() == pytest.approx((x[0, 0, 3, 3] + x[0, 0, 4, 5]).item() / 2)  # window of rows and columns 2 to 6
    assert y[0, 0, 1, 1].item() == pytest.approx(x[0, 0, 3, 3].item())  # 0 to 4
    assert updated[0, 0].tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]


def test_hole_larger_than_the_window_shrinks_by_its_half():
    known = torch.ones(1, 1, 24, 24)
    known[..., 6:18, 4:20] = 0
    x = torch.ones(1, 8, 24, 24)
    _, down = PartialSampler(CARAFE(8, down=2))(x, known)
    assert (down[0, 0] == 0).nonzero().tolist() == [[i, j] for i in range(4, 8) for j in range(3, 9)]  # sources 8..15, 6..17
    y, up = PartialSampler(CARAFE(8, up=2))(x, known)
    hole = torch.zeros(48, 48, dtype=torch.bool)
    hole[16:32, 12:36] = True
    assert torch.equal(up[0, 0] == 0, hole)
    assert torch.equal(y[0, 0] == 0, hole)
    y, up = PartialSampler(CARAFE(8, up=2))(x, torch.zeros(1, 1, 24, 24))
    assert y.abs().max() == up.max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{"down": 2}, {"up": 2}], ids=str)
def test_known_pixel_of_tiny_weight_decides_where_it_is_alone(options, dtype):
    # the centre outweighs the corner by e**200, which no precision holds
    logits = torch.full((5, 5), -100.0)
    logits[2, 2] = 100
    sampler = fixed_carafe(1, logits.flatten().repeat_interleave(options.get("up", 1) ** 2), **options)
    x, known = torch.rand(1, 1, 9, 9).to(dtype), torch.zeros(1, 1, 9, 9, dtype=dtype)
    known[..., 2, 2] = 1
    y, updated = PartialSampler(sampler.to(dtype))(x, known)
    assert updated.sum() > 1
    torch.testing.assert_close(y, x[..., 2, 2].item() * updated)


@pytest.mark.parametrize(
    "kind", [Nearest, Bilinear, AvgPool, UP, DOWN], ids=["nearest", "bilinear", "avg_pool", "carafe_up", "carafe_down"]
)
def test_constant_image_is_what_it_is_without_a_hole(kind):
    torch.manual_seed(0)
    x, known = torch.full((1, 8, 16, 16), 0.7), random_mask(16, 16, share=0.3).float()
    sampler = PartialSampler(
        fixed_carafe(8, torch.randn(25 * kind.keywords.get("up", 1) ** 2), **kind.keywords) if kind in (UP, DOWN) else kind(8)
    )
    y, updated = sampler(x, known)
    torch.testing.assert_close(y, sampler.sampler(x) * updated)


def test_samplers_without_known_weights_for_masks_are_refused():
    with pytest.raises(TypeError, match="CARAFE, Nearest, Bilinear, AvgPool, got Deconv"):
        PartialGlobalLocal(4, upsample=Deconv)
    with pytest.raises(ValueError, match="softmax or sigmoid_normalized in a partial convolution, got 'none'"):
        PartialGlobalLocal(4, upsample=partial(CARAFE, up=2, normalizer="none"))
    with pytest.raises(ValueError, match="border must be zero or renormalize in a partial convolution, got 'shift'"):
        PartialGlobalLocal(4, upsample=partial(CARAFE, up=2, border="shift"))
    with pytest.raises(ValueError, match="got up=3, down=2"):
        PartialSampler(CARAFE(4, up=3, down=2))


def test_gradients_reach_kernels_and_features_through_masks():
    torch.manual_seed(0)
    sampler = PartialSampler(lively_carafe(2, up=2, kernel_size=3, compressed_channels=2))
    known = random_mask(4, 4)
    x = torch.randn(1, 2, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sampler(x, known)[0], x)
    sampler(x, known)[0].square().sum().backward()
    assert sampler.sampler.content_encoder.weight.grad.abs().max() > 0
