"""PSPNet (Zhao et al., 2017), one of the networks that Table VIII compares.

State-dict keys of the decoder are those of the authors' public PyTorch implementation.
"""

import torch
import torch.nn as nn
from torch import Tensor

from .adaptive_pooling import CellPool
from .decoding import Backbone, enlarge_cells, make_classifier, make_conv_bn_relu, stretch
from .samplers import Sampler, make_samplers


class PyramidPooling(nn.Module):
    """Pyramid pooling: pools a map to a few cells, reduces the channels, upsamples to the size of the map, and appends the result to the
    map.

    Args:
        channels: channels of the map.
        dim: channels of each branch.
        scales: cells per side of the branches.
        sampler: upsampler of the branches, see `PSPNet`.
    """

    def __init__(self, channels: int, dim: int, scales: tuple[int, ...], sampler: Sampler | None):
        super().__init__()
        self.features = nn.ModuleList(nn.Sequential(CellPool(scale), *make_conv_bn_relu(channels, dim, 1)) for scale in scales)
        self.up = make_samplers(sampler, dim, channels, len(scales))

    def forward(self, x: Tensor) -> Tensor:
        """Compute [N, channels + len(scales) * dim, H, W] from x [N, channels, H, W]."""
        size, outputs = x.shape[2:], [x]
        for feature, up in zip(self.features, self.up, strict=True):
            cells = feature(x)
            outputs.append(stretch(cells, size) if up is None else enlarge_cells(cells, size, up, x))
        return torch.cat(outputs, dim=1)


class PSPNet(nn.Module):
    """Semantic segmentation from the last map of a dilated backbone and its averages over large cells.

    Args:
        backbone: maps an image [N, 3, H, W] to features C2 to C5; `out_channels` lists their channels. In the published network, C4 and C5
            have stride 8.
        num_classes: number of classes.
        ppm: None upsamples pooled cells bilinearly. A sampler, with ppm_dim channels, upsamples the last factor 2, after a bilinear
            interpolation to half the size of C5, as in the paper's UperNet.
        dim, ppm_dim: channels of the last map and of each pooled branch.
        pool_scales: cells per side of the branches.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        ppm: Sampler | None = None,
        dim: int = 512,
        ppm_dim: int = 512,
        pool_scales: tuple[int, ...] = (1, 2, 3, 6),
    ):
        super().__init__()
        *_, middle, top = backbone.out_channels
        self.backbone = backbone
        self.ppm = PyramidPooling(top, ppm_dim, pool_scales, ppm)
        self.cls = make_classifier(top + len(pool_scales) * ppm_dim, dim, num_classes)
        self.aux = make_classifier(middle, dim // 2, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Predict logits [N, num_classes, h, w] at the size of C5 for images x [N, 3, H, W]; in training also auxiliary logits from C4."""
        *_, c4, c5 = self.backbone(x)
        logits = self.cls(self.ppm(c5))
        return (logits, self.aux(c4)) if self.training else logits
