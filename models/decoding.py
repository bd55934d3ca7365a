"""Parts that the decoders of the segmentation networks share."""

from collections.abc import Sequence
from typing import Protocol

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .samplers import resize


class Backbone(Protocol):
    """A module that computes features C2 to C5 of an image, from fine to coarse."""

    @property
    def out_channels(self) -> Sequence[int]:
        """Channels of the features."""
        ...

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Compute C2 to C5, [N, out_channels[i], h_i, w_i], of images x [N, 3, H, W]."""
        ...


def make_conv_bn_relu(inputs: int, outputs: int, kernel_size: int) -> nn.Sequential:
    """Build a convolution without bias, batch normalisation and ReLU; the map keeps its size."""
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def make_classifier(inputs: int, dim: int, num_classes: int) -> nn.Sequential:
    """Build the pixel classifier of PSPNet's and PSANet's public implementations: 3x3 convolution to `dim` channels, dropout, 1x1."""
    return nn.Sequential(*make_conv_bn_relu(inputs, dim, 3), nn.Dropout2d(0.1), nn.Conv2d(dim, num_classes, 1))


def stretch(x: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate x [N, C, H, W] bilinearly to `size` with aligned corners, as PSPNet's and PSANet's public implementations do."""
    return F.interpolate(x, (size[0], size[1]), mode="bilinear", align_corners=True)


def enlarge_cells(cells: Tensor, size: Sequence[int], sampler: nn.Module | None, guide: Tensor) -> Tensor:
    """Upsample pooled cells [N, C, h, w] to `size` (paper, section 4.2).

    Without a sampler, the interpolation to `size` is bilinear. With a sampler, it is bilinear to half of `size`, and the sampler upsamples
    the result by 2. `guide` [N, guide_channels, *size] is passed to a sampler that needs one.

    Raises:
        ValueError: the sampler does not upsample by 2.
    """
    if sampler is not None:
        cells = resize(cells, ((size[0] + 1) // 2, (size[1] + 1) // 2), None)
    return resize(cells, size, sampler, guide, slot="ppm")
