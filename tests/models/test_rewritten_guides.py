"""A sampler that rewrites its guide: FreqFusion's definition and published weights, and the networks that take the pair."""

from functools import partial

import pytest
import torch
from carafepp.models.detection import MaskRCNN
from carafepp.models.fpn import FPN
from carafepp.models.freq_fusion import FreqFusion
from carafepp.models.regions import trace_regions
from carafepp.models.resnet import ResNet
from carafepp.models.samplers import make_sampler, resize, resize_pair, upsample_nearest
from carafepp.models.upernet import UperNet
from guided_upsampler_definitions import freq_fusion
from networks import UP
from torch import nn

SMALL = partial(FreqFusion, compressed_channels=8)


class Amplifier(nn.Module):
    """A sampler as a user writes one: it rewrites the guide to 10 times the guide."""

    needs_guide = True
    rewrites_guide = False

    def __init__(self, channels, guide_channels=None, rewrites_guide=False):
        super().__init__()
        self.rewrites_guide = rewrites_guide

    def forward(self, x, guide=None):
        y = upsample_nearest(x)
        y = y if guide is None else y[..., : guide.shape[2], : guide.shape[3]]
        return (y, 10 * guide) if self.rewrites_guide else y


@pytest.mark.parametrize("size", [(8, 6), (7, 6), (9, 5), (2, 3)], ids=str)
@pytest.mark.parametrize("resample", [True, False])
@torch.no_grad()
def test_the_pair_of_freq_fusion(size, resample):
    torch.manual_seed(0)
    module = SMALL(8, 12, resample=resample, rewrites_guide=True).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, guide = torch.randn(2, 8, size[0] // 2, size[1] // 2).double(), torch.randn(2, 12, *size).double()
    torch.testing.assert_close(module(x, guide), freq_fusion(module, x, guide))
    alone = SMALL(8, 12, resample=resample).double()
    alone.load_state_dict(module.state_dict())
    assert torch.equal(alone(x, guide), module(x, guide)[0])


def test_freq_fusion_loads_published_weights():
    """Names and shapes of a state dict of the authors' detectors."""

    def conv(name, outputs, inputs, side):
        return {f"{name}.weight": torch.randn(outputs, inputs, side, side), f"{name}.bias": torch.randn(outputs)}

    state = {
        **conv("hr_channel_compressor", 64, 256, 1),
        **conv("lr_channel_compressor", 64, 256, 1),
        **conv("content_encoder", 25, 64, 3),
        **conv("content_encoder2", 9, 64, 3),
        **conv("dysampler.offset", 32, 72, 3),
        **conv("dysampler.direct_scale", 32, 72, 3),
        **conv("dysampler.hr_offset", 8, 72, 3),
        **conv("dysampler.hr_direct_scale", 8, 72, 3),
        **{f"dysampler.norm_{side}.{name}": torch.randn(64) for side in ("hr", "lr") for name in ("weight", "bias")},
        "dysampler.init_pos": torch.zeros(1, 32, 1, 1),
        "hamming_lowpass": torch.full((1, 1, 5, 5), 0.5),
        "hamming_highpass": torch.full((1, 1, 3, 3), 0.5),
    }
    module = FreqFusion(256)
    module.load_state_dict(dict(state))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state.pop(name)), name
    assert list(state) == ["dysampler.init_pos"]


def test_only_a_sampler_that_can_rewrites_and_only_where_it_is_told():
    assert make_sampler(SMALL, 8, 12, rewrites_guide=True).rewrites_guide
    assert not make_sampler(SMALL, 8, 12).rewrites_guide
    assert make_sampler(Amplifier, 8, 12, rewrites_guide=True).rewrites_guide
    assert make_sampler(UP, 8, 12, rewrites_guide=True)(torch.rand(1, 8, 2, 3)).shape == (1, 8, 4, 6)


@pytest.mark.parametrize("sampler", [SMALL, Amplifier])
def test_resize_gives_the_output_and_resize_pair_both(sampler):
    module = sampler(8, rewrites_guide=True)
    x, guide = torch.rand(1, 8, 3, 2), torch.rand(1, 8, 5, 4)
    y, rewritten = module(x, guide)
    assert torch.equal(resize(x, (5, 4), module, guide), y)
    pair = resize_pair(x, guide, module, slot="fpn")
    assert torch.equal(pair[0], y)
    assert torch.equal(pair[1], rewritten)
    with pytest.raises(ValueError, match=r"slot fpn turns 3 x 2 into 6 x 4 pixels, but the finer map has 12 x 8"):
        resize_pair(x, torch.rand(1, 8, 12, 8), module, slot="fpn")


def test_a_sampler_without_the_attribute_leaves_the_finer_map():
    x, fine = torch.rand(1, 8, 3, 2), torch.rand(1, 8, 5, 4)
    for sampler in (None, UP(8)):
        y, same = resize_pair(x, fine, sampler, slot="fpn")
        assert torch.equal(y, resize(x, (5, 4), sampler))
        assert same is fine


def test_the_pyramid_adds_the_rewritten_lateral():
    torch.manual_seed(0)
    pyramid = FPN([4, 8], 8, upsample=Amplifier)
    levels = {"0": torch.randn(1, 4, 9, 12), "1": torch.randn(1, 8, 5, 6)}
    fine, coarse = (block(level) for block, level in zip(pyramid.inner_blocks, levels.values(), strict=True))
    expected = pyramid.layer_blocks[0](10 * fine + upsample_nearest(coarse)[..., :9, :])
    torch.testing.assert_close(pyramid(levels)["0"], expected)


def test_upernet_takes_the_rewritten_maps_in_fpn_and_fuse_and_keeps_c5_in_the_ppm():
    torch.manual_seed(0)
    net = UperNet(ResNet((1, 1), width=4), 3, ppm=Amplifier, fpn=Amplifier, fuse=Amplifier, fpn_dim=8, ppm_dim=4, pool_scales=(1,)).eval()
    assert not net.ppm_up[0].rewrites_guide
    c4, c5 = torch.randn(1, 16, 9, 12), torch.randn(1, 32, 5, 6)
    p4, p5 = net.build_pyramid([c4, c5])
    lateral = net.fpn_in[0](c4)
    torch.testing.assert_close(p4, net.fpn_out[0](10 * lateral + upsample_nearest(p5)[..., :9, :]))
    torch.testing.assert_close(net.fuse([p4, p5]), torch.cat([10 * p4, upsample_nearest(p5)[..., :9, :]], 1))


def test_every_parameter_trains_in_upernet():
    net = UperNet(ResNet((1, 1), width=4), 3, ppm=SMALL, fpn=SMALL, fuse=SMALL, fpn_dim=8, ppm_dim=8, pool_scales=(1, 2))
    net(torch.randn(2, 3, 43, 30)).logsumexp(1).mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_the_mask_head_has_no_guide_and_gets_one_map():
    backbone = ResNet((1, 1), width=4)
    net = MaskRCNN(3, backbone=backbone, fpn=SMALL, mask_head=SMALL, fpn_dim=8, head_dim=8, mask_dim=8, mask_convs=1, min_size=64)
    assert net.backbone.fpn.upsample[0].rewrites_guide
    assert net.roi_heads.mask_predictor(torch.rand(2, 8, 14, 14)).shape == (2, 3, 28, 28)


def test_the_pair_exports():
    module = SMALL(8, resample=False, rewrites_guide=True).eval()
    x, guide = torch.randn(2, 8, 6, 5), torch.randn(2, 8, 12, 10)
    any_size = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    exported = torch.export.export(module, (x, guide), dynamic_shapes=[any_size] * 2).module()
    arguments = torch.randn(3, 8, 4, 7), torch.randn(3, 8, 8, 14)
    torch.testing.assert_close(exported(*arguments), module(*arguments))


def test_regions_are_traced_through_a_sampler_that_returns_the_pair():
    torch.manual_seed(0)
    pyramid = FPN([3, 4], 8, upsample=SMALL)
    network = nn.ModuleDict({"down": nn.Conv2d(3, 4, 3, stride=2, padding=1), "fpn": pyramid})
    network.forward = lambda x: network["fpn"]({"0": x, "1": network["down"](x)})["0"]
    regions = trace_regions(network, [torch.rand(1, 3, 16, 16)], ["fpn.upsample.0"], [(0.5, 0.5)])
    assert [region.module for region in regions] == ["fpn.upsample.0", ""]
