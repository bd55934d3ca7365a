"""The feature pyramid: torchvision's, and guided samplers in it."""

import pytest
import torch
from carafepp.models.fpn import FPN
from carafepp.models.samplers import Nearest
from configurations import configured_sampler
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool


@torch.no_grad()
@pytest.mark.parametrize("upsample", [None, Nearest])
@pytest.mark.parametrize("size", [(64, 96), (67, 95), (33, 40)])
def test_pyramid_is_torchvisions_whatever_the_size(size, upsample):
    channels = [4, 8, 16, 32]
    levels = {str(i): torch.randn(2, c, *(-(-side // 2**i) for side in size)) for i, c in enumerate(channels)}
    reference = FeaturePyramidNetwork(channels, 8, LastLevelMaxPool())
    pyramid = FPN(channels, 8, upsample=upsample, extra_blocks=LastLevelMaxPool())
    pyramid.load_state_dict(reference.state_dict())
    found, expected = pyramid(levels), reference(dict(levels))
    assert list(found) == list(expected) == ["0", "1", "2", "3", "pool"]
    for name, level in expected.items():
        torch.testing.assert_close(found[name], level)


def test_the_lateral_guides_the_pyramid():
    pyramid = FPN([4, 8], 8, upsample=configured_sampler("upsampler", "fade"))
    levels = {"0": torch.randn(1, 4, 9, 12), "1": torch.randn(1, 8, 5, 6)}
    seen = []
    pyramid.upsample[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    pyramid(levels)
    torch.testing.assert_close(seen[0], pyramid.inner_blocks[0](levels["0"]))
