"""The sampler slot and its plain occupants.

A slot is a constructor argument `Callable[[int], nn.Module]`: channels in, a module out that keeps the channels and resizes by 2. What
else a sampler needs travels in `functools.partial`: `partial(CARAFE, up=2)`, `partial(MaxPool, down=2)`.

Sizes: an upsampler makes H x W into 2H x 2W, and a network crops that where the finer map is odd (`resize`); a downsampler makes
ceil(H / 2) x ceil(W / 2), as a 3x3 convolution or pool of stride 2 and padding 1 does, so that it fits wherever one of those stood.
"""

from collections.abc import Callable

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Sampler = Callable[[int], nn.Module]


def published() -> None:
    """Leave a slot empty: the network samples as it was published. The target of the `published` configuration files."""


def resize(x: Tensor, size: tuple[int, int], sampler: nn.Module | None) -> Tensor:
    """Bring `x` [N, C, H, W] to `size`: bilinearly in one step without a sampler, otherwise by 2 and cropped at the bottom and right."""
    if sampler is None:
        return F.interpolate(x, size, mode="bilinear", align_corners=False)
    return sampler(x)[..., : size[0], : size[1]]


class Nearest(nn.Module):
    """Nearest-neighbour interpolation by `up`: every pixel becomes an up x up block. No parameters, no arithmetic."""

    def __init__(self, channels: int, up: int = 2):
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H * up, W * up]."""
        return F.interpolate(x, scale_factor=self.up, mode="nearest")

    def extra_repr(self) -> str:
        return f"up={self.up}"


class Bilinear(nn.Module):
    """Bilinear interpolation by `up` with pixel centres aligned (align_corners=False). No parameters, 8 FLOPs per output element."""

    def __init__(self, channels: int, up: int = 2):
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H * up, W * up]."""
        return F.interpolate(x, scale_factor=self.up, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        return f"up={self.up}"


class StridedConv(nn.Conv2d):
    """3x3 convolution of stride `down`, C to C channels: learned downsampling with fixed kernels. 9 C^2 + C parameters.

    As a sampler it stands before the network's own convolution. The strided convolution of the paper's Table III is the published
    network: an empty slot, where that own convolution has the stride.
    """

    def __init__(self, channels: int, down: int = 2):
        super().__init__(channels, channels, kernel_size=3, stride=down, padding=1)


class MaxPool(nn.MaxPool2d):
    """Maximum over 3x3 at stride `down`. No parameters.

    The paper leaves the window open; 3x3 is that of ResNet's stem, and unlike 2x2 it keeps the ceil sizes and the centres of the
    strided convolutions that it replaces.
    """

    def __init__(self, channels: int, down: int = 2):
        super().__init__(kernel_size=3, stride=down, padding=1)


class AvgPool(nn.AvgPool2d):
    """Mean over 3x3 at stride `down`, window as in `MaxPool`. No parameters.

    A window that leaves the map averages the pixels that it has, so that borders are not darkened.
    """

    def __init__(self, channels: int, down: int = 2):
        super().__init__(kernel_size=3, stride=down, padding=1, count_include_pad=False)
