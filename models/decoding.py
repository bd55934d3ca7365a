"""What the segmentation networks' decoders share."""

from collections.abc import Sequence
from typing import Protocol

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .samplers import resize


class Backbone(Protocol):
    """A module that makes features C2 to C5 of an image [N, 3, H, W], from fine to coarse."""

    @property
    def out_channels(self) -> Sequence[int]:
        """Channels of the features."""
        ...

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Image [N, 3, H, W] -> C2 to C5, [N, out_channels[i], h_i, w_i]."""
        ...


def conv_bn_relu(inputs: int, outputs: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias, batch norm and ReLU, of the same size."""
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def classifier(inputs: int, dim: int, num_classes: int) -> nn.Sequential:
    """3x3 convolution to `dim` channels, dropout and a classifier of pixels, as in PSPNet's and PSANet's public implementations."""
    return nn.Sequential(*conv_bn_relu(inputs, dim, 3), nn.Dropout2d(0.1), nn.Conv2d(dim, num_classes, 1))


def stretch(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bring `x` [N, C, H, W] to `size` bilinearly, corner pixels on corner pixels, as PSPNet's and PSANet's public implementations do."""
    return F.interpolate(x, list(size), mode="bilinear", align_corners=True)


def enlarge_cells(cells: Tensor, size: Sequence[int], sampler: nn.Module | None, guide: Tensor) -> Tensor:
    """Bring pooled cells [N, C, h, w] to `size`: bilinearly, or with a sampler to half of it bilinearly and then by 2 (section 4.2)."""
    if sampler is not None:
        cells = resize(cells, ((size[0] + 1) // 2, (size[1] + 1) // 2), None)
    return resize(cells, size, sampler, guide)
