"""UperNet with a sampler slot for each of its three parts (paper, section 4.2; Xiao et al., 2018).

State-dict keys and initialisation of the decoder are those of the authors' public implementation.
"""

import torch
import torch.nn as nn
from torch import Tensor

from .adaptive_pooling import CellPool
from .decoding import Backbone, enlarge_cells, make_conv_bn_relu
from .samplers import Sampler, make_sampler, make_samplers, resize, resize_pair


def _make_layer(inputs: int, outputs: int, kernel_size: int) -> nn.Sequential:
    layer = make_conv_bn_relu(inputs, outputs, kernel_size)
    nn.init.kaiming_normal_(layer[0].get_parameter("weight"))
    nn.init.constant_(layer[1].get_parameter("bias"), 1e-4)
    return layer


class UperNet(nn.Module):
    """Semantic segmentation from a pyramid of features.

    PPM pools C5 to 1, 2, 3 and 6 cells per side, upsamples each result to the size of C5 and applies a 1x1 convolution. FPN adds upsampled
    features to the laterals top-down. FUSE upsamples all levels to the size of P2 and concatenates them.

    A sampler that needs a guide gets the map that its output is combined with: C5, the lateral or the finer level. In FPN and FUSE, a
    sampler may also rewrite this map (see samplers.py).

    Args:
        backbone: maps an image [N, 3, H, W] to features C2 to C5 of strides 4, 8, 16, 32; `out_channels` lists their channels.
        num_classes: number of classes.
        ppm: None upsamples pooled cells bilinearly to the size of C5. A sampler, with the channels of C5, upsamples the last factor 2,
            after a bilinear interpolation to half that size.
        fpn: None upsamples bilinearly to the size of the lateral. A sampler upsamples by 2, with fpn_dim channels.
        fuse: None upsamples every level bilinearly to the size of P2. Samplers upsample and concatenate in sequence, P5 to P4 to P3 to P2,
            with fpn_dim, 2 fpn_dim and 3 fpn_dim channels.
        fpn_dim, ppm_dim: channels of the FPN and of each PPM branch.
        pool_scales: cells per side of the branches of the PPM.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        ppm: Sampler | None = None,
        fpn: Sampler | None = None,
        fuse: Sampler | None = None,
        fpn_dim: int = 512,
        ppm_dim: int = 512,
        pool_scales: tuple[int, ...] = (1, 2, 3, 6),
    ):
        super().__init__()
        *laterals, top = backbone.out_channels
        self.backbone = backbone
        self.ppm_pooling = nn.ModuleList(CellPool(scale) for scale in pool_scales)
        self.ppm_up = make_samplers(ppm, top, top, len(pool_scales))
        self.ppm_conv = nn.ModuleList(_make_layer(top, ppm_dim, 1) for _ in pool_scales)
        self.ppm_last_conv = _make_layer(top + len(pool_scales) * ppm_dim, fpn_dim, 3)
        self.fpn_in = nn.ModuleList(_make_layer(channels, fpn_dim, 1) for channels in laterals)
        self.fpn_up = make_samplers(fpn, fpn_dim, fpn_dim, len(laterals), rewrites_guide=True)
        # the extra nesting gives the published keys
        self.fpn_out = nn.ModuleList(nn.Sequential(_make_layer(fpn_dim, fpn_dim, 3)) for _ in laterals)
        fuse_dims = [(i + 1) * fpn_dim for i in range(len(laterals))]
        self.fuse_up = nn.ModuleList(make_sampler(fuse, dim, fpn_dim, rewrites_guide=True) for dim in fuse_dims) if fuse else None
        classifier = nn.Conv2d(fpn_dim, num_classes, 1)
        nn.init.kaiming_normal_(classifier.weight)
        self.conv_last = nn.Sequential(_make_layer((len(laterals) + 1) * fpn_dim, fpn_dim, 3), classifier)

    def pool(self, c5: Tensor) -> Tensor:
        """Compute P5 [N, fpn_dim, H, W] from C5 [N, C, H, W] (PPM)."""
        branches = [
            conv(enlarge_cells(pooling(c5), c5.shape[2:], sampler, c5))
            for pooling, sampler, conv in zip(self.ppm_pooling, self.ppm_up, self.ppm_conv, strict=True)
        ]
        return self.ppm_last_conv(torch.cat([c5, *branches], dim=1))

    def build_pyramid(self, levels: list[Tensor]) -> list[Tensor]:
        """Compute P2 to P5, [N, fpn_dim, H_i, W_i], from C2 to C5, [N, C_i, H_i, W_i] (FPN)."""
        *laterals, c5 = levels
        y = self.pool(c5)
        outputs = [y]
        for i in reversed(range(len(laterals))):
            lateral = self.fpn_in[i](laterals[i])
            y, lateral = resize_pair(y, lateral, self.fpn_up[i], slot="fpn")
            y = lateral + y
            outputs.insert(0, self.fpn_out[i](y))
        return outputs

    def fuse(self, levels: list[Tensor]) -> Tensor:
        """Concatenate P2 to P5, in this order, to [N, 4 * fpn_dim, H, W] at the size of P2 (FUSE)."""
        if self.fuse_up is None:
            return torch.cat([resize(level, levels[0].shape[2:], None) for level in levels], dim=1)
        *finer, y = levels
        for level, sampler in zip(reversed(finer), self.fuse_up, strict=True):
            y, level = resize_pair(y, level, sampler, slot="fuse")
            y = torch.cat([level, y], dim=1)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Predict logits [N, num_classes, ceil(H / 4), ceil(W / 4)] for images x [N, 3, H, W].

        The published training also takes its loss at this size.

        Raises:
            ValueError: two levels do not have the ratio of the sampler between them, such as those of a dilated backbone.
        """
        return self.conv_last(self.fuse(self.build_pyramid(self.backbone(x))))
