"""Feature pyramid with a slot for its upsampler (paper, section 4.1 and Figure 5; Lin et al., 2017)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from .samplers import Sampler, make_samplers, resize_pair


class FPN(FeaturePyramidNetwork):
    """torchvision's feature pyramid with a sampler between levels; parameter names are torchvision's.

    Args:
        in_channels_list: channels of the backbone's levels, finest first.
        out_channels: channels of every level of the pyramid.
        upsample: None means nearest-neighbour interpolation to the size of the lateral. Otherwise each pair of levels has a sampler with
            `out_channels` channels that upsamples by 2, to the size of the lateral. The lateral is also the guide (see `resize_pair`).
        extra_blocks: computes further levels from the outputs; `LastLevelMaxPool()` computes the fifth level of detectors.
    """

    def __init__(
        self,
        in_channels_list: Sequence[int],
        out_channels: int,
        *,
        upsample: Sampler | None = None,
        extra_blocks: ExtraFPNBlock | None = None,
    ):
        super().__init__(list(in_channels_list), out_channels, extra_blocks)
        self.upsample = make_samplers(upsample, out_channels, out_channels, len(in_channels_list) - 1, rewrites_guide=True)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Build the pyramid.

        Args:
            x: [N, in_channels_list[i], H_i, W_i] by name, finest first.

        Returns:
            [N, out_channels, H_i, W_i] under the same names, followed by the extra levels.

        Raises:
            ValueError: two levels do not have the ratio of the sampler between them, such as those of a dilated backbone.
        """
        names, inputs = list(x), list(x.values())
        laterals = [block(level) for block, level in zip(self.inner_blocks, inputs, strict=True)]
        for i in reversed(range(len(self.upsample))):
            fine, coarse, sampler = laterals[i], laterals[i + 1], self.upsample[i]
            if sampler is None:
                coarse = F.interpolate(coarse, fine.shape[2:], mode="nearest")
            else:
                coarse, fine = resize_pair(coarse, fine, sampler, slot="fpn")
            laterals[i] = fine + coarse
        outputs = [block(lateral) for block, lateral in zip(self.layer_blocks, laterals, strict=True)]
        if self.extra_blocks is not None:
            outputs, names = self.extra_blocks(outputs, inputs, names)
        return dict(zip(names, outputs, strict=True))
