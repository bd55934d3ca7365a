"""Wrong samplers in a slot: each gives one error, which names the class and what a slot needs."""

from functools import partial

import pytest
import torch
from carafepp.models.detection import MaskRCNN
from carafepp.models.fpn import FPN
from carafepp.models.resnet import tiny
from carafepp.models.samplers import Nearest, resize, resize_pair
from networks import small_resnet
from torch import nn


class Base(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x


class NoChannels(Base):
    def __init__(self):
        super().__init__(1)


class TwoArguments(Base):
    def forward(self, x, guide):
        return x


class NoGuideChannels(Base):
    needs_guide = True


class NoGuide(Base):
    needs_guide = True

    def __init__(self, channels, guide_channels=None):
        super().__init__(channels)


class List(Base):
    def forward(self, x):
        return [x]


class MoreChannels(Base):
    def forward(self, x):
        return torch.cat([x, x], dim=1)


class Flat(Base):
    def forward(self, x):
        return x.flatten(1)


class Same(Base):
    pass


class NotAModule:
    def __init__(self, channels):
        self.channels = channels


MADE = [
    (NoChannels, r"the sampler NoChannels is made by NoChannels\(channels\), but its constructor does not take .*too many positional"),
    (NoGuideChannels, r"made by NoGuideChannels\(channels, guide_channels\), .*unexpected keyword argument 'guide_channels'"),
    (NotAModule, r"the sampler NotAModule must make a torch.nn.Module, got an object of type NotAModule"),
    (lambda channels: len, r"the sampler <lambda> must make a torch.nn.Module, got .* builtin_function_or_method"),
    (
        partial(TwoArguments),
        r"the sampler TwoArguments is called with \(x\), .*a required argument: 'guide'; .* needs_guide = True",
    ),
    (NoGuide, r"the sampler NoGuide is called with \(x, guide\), but its forward does not take them: too many positional"),
]
CALLED = [
    (List, TypeError, r"the sampler List must return a tensor \[N, 8, h, w\], got an object of type list"),
    (
        MoreChannels,
        ValueError,
        r"the sampler MoreChannels must keep the channels of .* \(1, 8, 4, 4\), got the shape \(1, 16, 4, 4\)",
    ),
    (Flat, ValueError, r"the sampler Flat must keep the channels of its input \(1, 8, 4, 4\), got the shape \(1, 128\)"),
]


@pytest.mark.parametrize(("slot", "message"), MADE, ids=range(len(MADE)))
def test_a_slot_that_makes_no_sampler_is_refused_when_the_network_is_built(slot, message):
    with pytest.raises(TypeError, match=message):
        FPN([4, 8], 8, upsample=slot)
    with pytest.raises(TypeError, match=message):
        tiny(downsample=slot)
    with pytest.raises(TypeError, match=message):
        MaskRCNN(2, backbone=small_resnet(), mask_head=slot, mask_dim=8, mask_convs=1)


@pytest.mark.parametrize(("sampler", "error", "message"), CALLED, ids=lambda case: getattr(case, "__name__", ""))
def test_an_output_that_is_no_map_of_the_channels_is_refused(sampler, error, message):
    x, fine = torch.rand(1, 8, 4, 4), torch.rand(1, 8, 8, 8)
    with pytest.raises(error, match=message):
        resize(x, (8, 8), sampler(8))
    with pytest.raises(error, match=message):
        resize_pair(x, fine, sampler(8), slot="fpn")
    with pytest.raises(error, match=f"the sampler {sampler.__name__} must"):
        tiny(downsample=sampler)(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("sampler", [Same, Nearest], ids=lambda sampler: sampler.__name__)
def test_a_downsampler_that_does_not_halve_is_refused(sampler):
    """Main path and shortcut of a block would have equal sizes, so that nothing else fails."""
    got = {Same: "16 x 16", Nearest: "32 x 32"}[sampler]
    with pytest.raises(ValueError, match=rf"the downsampler {sampler.__name__} must turn 16 x 16 pixels into 8 x 8, got {got}"):
        tiny(downsample=sampler)(torch.rand(1, 3, 32, 32))
