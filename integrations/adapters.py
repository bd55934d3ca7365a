"""Modules that stand in the place of a layer: a sampler, and what else the layer did."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..models.samplers import check_fit, fit, takes_size


# torch.fx calls it as a whole, because it cannot follow the branches on sizes
@torch.fx.wrap
def fit_to(y: Tensor, x: Tensor, size: Sequence[int]) -> Tensor:
    """Fit y, upsampled from x, to `size`: cut its last row or column, or repeat it.

    Raises:
        ValueError: `size` is not that of the sampler's scale, up to less than one cell.
    """
    check_fit(x.shape[2:], y.shape[2:], size, "replaced by carafepp.replace")
    return fit(y, size)


def resize_with(sampler: nn.Module, x: Tensor, size: Sequence[int]) -> Tensor:
    """Upsample x [N, C, H, W] to [N, C, *size] with a sampler, whose scale must give `size` up to less than one cell."""
    return sampler(x, size=size) if takes_size(sampler) else fit_to(sampler(x), x, size)


class Adapter(nn.Module):
    """Base of the modules that `replace` installs around a sampler.

    Attributes:
        sampler: the sampler.
    """

    def __init__(self, sampler: nn.Module):
        super().__init__()
        self.sampler = sampler


class SizedSampler(Adapter):
    """Sampler to a given size, in the place of an interpolation to this size.

    Args:
        sampler: the sampler.
        size: rows and columns; None where a call may pass them.
    """

    def __init__(self, sampler: nn.Module, size: Sequence[int] | None = None):
        super().__init__(sampler)
        self.size = size

    def forward(self, x: Tensor, size: Sequence[int] | int | None = None) -> Tensor:
        """Resize x [N, C, H, W] to [N, C, *size], or by the scale of the sampler without a size. One number is both sides."""
        size = self.size if size is None else size
        if isinstance(size, int | torch.SymInt):
            size = size, size
        return self.sampler(x) if size is None else resize_with(self.sampler, x, size)


class FittedSampler(Adapter):
    """Downsampler whose output is cut at the bottom and right to the size that the replaced layer gives.

    Args:
        sampler: the downsampler, which gives ceil(H / scale) x ceil(W / scale) pixels.
        scale: the scale of the sampler.
        shortfall: n, rows and columns, where the layer gives ceil((H - n) / scale) rows; 1 for a 2x2 window of stride 2.
        margin: whether to surround the output with n rows of zeros, for a convolution that follows and takes them away.
    """

    def __init__(self, sampler: nn.Module, scale: int, shortfall: tuple[int, int], margin: bool = False):
        super().__init__(sampler)
        self.scale, self.shortfall = scale, shortfall
        before = tuple(n // 2 if margin else 0 for n in shortfall)
        self.before, self.after = before, tuple(n - b if margin else 0 for n, b in zip(shortfall, before, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x [N, C, H, W] to [N, C, ceil((H - n) / scale), ceil((W - m) / scale)], plus the margin."""
        (short, narrow), last = self.shortfall, self.scale - 1
        # negative padding crops; a slice would restrict an exported program to even or to odd maps
        bottom = (x.shape[2] - short + last) // self.scale - (x.shape[2] + last) // self.scale + self.after[0]
        right = (x.shape[3] - narrow + last) // self.scale - (x.shape[3] + last) // self.scale + self.after[1]
        return F.pad(self.sampler(x), (self.before[1], right, self.before[0], bottom))


class SampledConv(Adapter):
    """Downsampler, followed by a convolution that had the stride (paper, Figure 4).

    Args:
        sampler: the downsampler.
        conv: the convolution, with stride 1.
    """

    def __init__(self, sampler: nn.Module, conv: nn.Module):
        super().__init__(sampler)
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x [N, C, H, W] and convolve it."""
        return self.conv(self.sampler(x))


class SampledDeconv(Adapter):
    """Upsampler in the place of a transposed convolution.

    Where the convolution changes the number of channels, a 1x1 convolution does so before the sampler, at the low resolution. It starts as
    the mean of the replaced weights over the positions of the output, so that flat regions keep their values.

    Args:
        sampler: the upsampler, for the channels of the output.
        deconv: the replaced convolution.
        excess: rows and columns that the output has beyond those of the sampler.
    """

    def __init__(self, sampler: nn.Module, deconv: nn.ConvTranspose2d, excess: tuple[int, int]):
        super().__init__(sampler)
        self.scale, self.excess = cast(tuple[int, int], deconv.stride), excess
        self.projection = nn.Identity()
        if deconv.in_channels != deconv.out_channels:
            self.projection = project_mean(deconv)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, C_in, H, W] to [N, C_out, H * scale + excess, W * scale + excess], or to `output_size`."""
        x = self.projection(x)
        if output_size is not None:
            return resize_with(self.sampler, x, list(output_size)[-2:])
        if not any(self.excess):
            return self.sampler(x)
        size = [x.shape[2] * self.scale[0] + self.excess[0], x.shape[3] * self.scale[1] + self.excess[1]]
        return resize_with(self.sampler, x, size)


def project_mean(deconv: nn.ConvTranspose2d) -> nn.Conv2d:
    """Make the 1x1 convolution that gives the mean of a transposed convolution's output where the input is flat."""
    weight, bias = deconv.weight.detach(), deconv.bias
    skipped = nn.utils.skip_init(
        nn.Conv2d,
        deconv.in_channels,
        deconv.out_channels,
        1,
        groups=deconv.groups,
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    conv = cast(nn.Conv2d, skipped)
    mean = weight.sum((2, 3)) / (deconv.stride[0] * deconv.stride[1])  # [C_in, C_out / groups]
    with torch.no_grad():
        conv.weight.copy_(mean.unflatten(0, (deconv.groups, -1)).transpose(1, 2).flatten(0, 1)[..., None, None])
        if bias is not None and conv.bias is not None:
            conv.bias.copy_(bias)
    return conv


def remove_stride(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution of stride 1 that shares weights, buffers and hooks with `conv`, which stays as it is."""
    # copy.copy would refuse parametrized modules
    copy = conv.__class__.__new__(conv.__class__)
    vars(copy).update(vars(conv), stride=(1, 1))
    return copy
