"""The sampler slot and its occupants without parameters.

A slot is a constructor argument `Callable[[int], nn.Module]`: channels in, a module out that keeps the channels and resizes by 2. What
else a sampler needs travels in `functools.partial`: `partial(CARAFE, up=2)`, `partial(DySample, groups=8)`.

Sizes: an upsampler makes H x W into 2H x 2W, and a network crops that where the finer map is odd (`resize`); a downsampler makes
ceil(H / 2) x ceil(W / 2), as a 3x3 convolution or pool of stride 2 and padding 1 does, so that it fits wherever one of those stood.

Guides: an upsampler whose class says `needs_guide = True` looks at the finer map that its output will meet, `sampler(x, guide)`, with
x [N, C, H, W] and guide [N, guide_channels, h, w], h in (2H - 1, 2H) and w likewise; its output is [N, C, h, w]. Networks pass it
(`make_sampler`, `resize`). Without one, as in a mask head, x upsampled bilinearly guides itself.
"""

from collections.abc import Callable, Sequence

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Sampler = Callable[..., nn.Module]


def published() -> None:
    """Leave a slot empty: the network samples as it was published. The target of the `published` configuration files."""


def shared(slot: Sampler | None) -> Sampler | None:
    """Fill a slot with what the others take. The target of the `shared` configuration file, which a choice for the slot replaces whole."""
    return slot


def make_sampler(slot: Sampler, channels: int, guide_channels: int) -> nn.Module:
    """Fill a slot where a finer map of `guide_channels` is at hand: `slot(channels)`, told those channels if it needs a guide."""
    # a partial hides its class in .func
    if getattr(getattr(slot, "func", slot), "needs_guide", False):
        return slot(channels, guide_channels=guide_channels)
    return slot(channels)


def make_samplers(slot: Sampler | None, channels: int, guide_channels: int, count: int) -> nn.ModuleList:
    """Fill a slot `count` times, as `make_sampler` does; an empty slot gives a list of None."""
    samplers = (make_sampler(slot, channels, guide_channels) if slot else None for _ in range(count))
    # torch allows None in a list of modules, its type hints do not
    return nn.ModuleList(samplers)  # pyright: ignore[reportArgumentType]


def resize(x: Tensor, size: Sequence[int], sampler: nn.Module | None, guide: Tensor | None = None) -> Tensor:
    """Bring `x` [N, C, H, W] to `size`: bilinearly in one step without a sampler, otherwise by 2 and cropped at the bottom and right.

    `guide` [N, guide_channels, *size] goes to a sampler that needs one.
    """
    if sampler is None:
        return F.interpolate(x, list(size), mode="bilinear", align_corners=False)
    y = sampler(x, guide) if getattr(sampler, "needs_guide", False) else sampler(x)
    return y[..., : size[0], : size[1]]


def nearest(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W], every pixel a 2x2 block."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def bilinear(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W], bilinear between pixel centres (align_corners=False)."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Nearest(nn.Module):
    """Nearest-neighbour interpolation: every pixel becomes a 2x2 block. The FPN's own upsampler (Table IV). No parameters."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2H, 2W]."""
        return nearest(x)


class Bilinear(nn.Module):
    """Bilinear interpolation with pixel centres aligned (Table IV). No parameters, 8 FLOPs per output element."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2H, 2W]."""
        return bilinear(x)


class MaxPool(nn.MaxPool2d):
    """Maximum over 3x3 at stride 2 (Table III). No parameters.

    The paper leaves the window open; 3x3 is that of ResNet's stem, and unlike 2x2 it keeps the ceil sizes and the centres of the
    strided convolutions that it replaces.
    """

    def __init__(self, channels: int):
        super().__init__(kernel_size=3, stride=2, padding=1)


class AvgPool(nn.AvgPool2d):
    """Mean over 3x3 at stride 2 (Table III), window as in `MaxPool`. No parameters.

    A window that leaves the map averages the pixels that it has, so that borders are not darkened.
    """

    def __init__(self, channels: int):
        super().__init__(kernel_size=3, stride=2, padding=1, count_include_pad=False)
