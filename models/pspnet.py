"""PSPNet, a network that the paper compares with (Table VIII; Zhao et al., 2017).

State-dict keys of the decoder are those of the authors' public PyTorch implementation.
"""

import torch
import torch.nn as nn
from torch import Tensor

from .decoding import Backbone, classifier, conv_bn_relu, enlarge_cells, stretch
from .samplers import Sampler, make_samplers


class PyramidPooling(nn.Module):
    """Pool to a few cells a side, reduce the channels, bring back to the map's size, and concatenate with the map."""

    def __init__(self, channels: int, dim: int, scales: tuple[int, ...], sampler: Sampler | None):
        super().__init__()
        self.features = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(scale), *conv_bn_relu(channels, dim, 1)) for scale in scales)
        self.up = make_samplers(sampler, dim, channels, len(scales))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, channels + len(scales) * dim, H, W]."""
        size, outputs = x.shape[2:], [x]
        for feature, up in zip(self.features, self.up, strict=True):
            cells = feature(x)
            outputs.append(stretch(cells, size) if up is None else enlarge_cells(cells, size, up, x))
        return torch.cat(outputs, dim=1)


class PSPNet(nn.Module):
    """Semantic segmentation from a dilated backbone's last map and what it holds on average in large cells.

    Args:
        backbone: image [N, 3, H, W] -> features C2 to C5; `out_channels` lists their channels. Published with C4 and C5 at stride 8.
        num_classes: classes.
        ppm: None upsamples pooled cells bilinearly; a sampler gets them bilinearly at half of C5's size, with ppm_dim channels, as in
            the paper's UperNet.
        dim, ppm_dim: channels of the last map and of each pooled branch.
        pool_scales: cells a side of the branches.
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
        self.cls = classifier(top + len(pool_scales) * ppm_dim, dim, num_classes)
        self.aux = classifier(middle, dim // 2, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Image [N, 3, H, W] -> logits [N, num_classes, h, w] of C5's size; in training also the auxiliary logits, of C4."""
        *_, c4, c5 = self.backbone(x)
        logits = self.cls(self.ppm(c5))
        return (logits, self.aux(c4)) if self.training else logits
