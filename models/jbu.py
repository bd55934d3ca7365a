"""Joint bilateral upsampling with learned kernels, as in FeatUp (Fu et al., ICLR 2024)."""

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reassemble_weights
from ..kernels.geometry import memory_format
from .guides import Guided, multiply_windows, prepare_guide
from .samplers import fit

torch.fx.wrap("fit")
torch.fx.wrap("multiply_windows")
torch.fx.wrap("prepare_guide")


@torch.fx.wrap
def pad_reflected(x: Tensor, radius: int) -> Tensor:
    """Pad x [N, C, H, W] by `radius` on every side with its reflection, which a map smaller than the radius repeats to and fro."""
    for dim in (2, 3):
        # F.pad cannot reflect a map smaller than the radius
        last = x.shape[dim] - 1
        places = torch.arange(-radius, last + 1 + radius, device=x.device)
        for _ in range(radius // 2 + 1):
            places = last - (last - places.abs()).abs()
        # a map of one pixel has nothing to reflect
        x = x.index_select(dim, places.clamp(min=0))
    return x


@torch.fx.wrap
def sum_reflected(x: Tensor, kernels: Tensor, radius: int) -> Tensor:
    """Sum the windows of x [N, C, H, W] with kernels [N, (2 * radius + 1)**2, H, W]; beyond the map, they read its reflection."""
    # the operator does not reflect: it sums windows of a padded map, whose own border is cut off
    padded, inside = F.pad(kernels, (radius,) * 4).to(x.dtype), slice(radius, -radius)
    y = reassemble_weights(pad_reflected(x, radius), padded, kernel_size=2 * radius + 1)[..., inside, inside]
    return y.contiguous(memory_format=memory_format(x))


class JBU(Guided):
    """Joint bilateral upsampling: kernels over 7x7 fine pixels from the similarity and the distance of the guide's pixels.

    The guide is projected to keys by two 1x1 convolutions. A kernel is softmax(t s - d^2 / (2 sigma^2)), with the inner product s of the
    keys of a pixel and of its neighbour, and their distance d, 1 from the centre of the window to a side. t, in (1e-4, 1e4), and sigma are
    learned. A tenth of a correction, which two 1x1 convolutions predict from kernel and guide, is added to the kernel. It sums the windows
    of the bicubically upsampled features, which are reflected at the border.

    81 C_guide + 5,990 parameters, 26,726 for C_guide = 256, and 6,233 for the image that guides FeatUp. State-dict keys are those of one
    level of the authors' code (github.com/mhamilton723/FeatUp, MIT licence), which stacks four.

    Args:
        channels: C, the channels of x.
        guide_channels: C_guide, the channels of the guide; None means C.
        dropout: probability with which a channel of the projections is dropped in training.
    """

    radius = 3
    key_channels = 32

    def __init__(self, channels: int, guide_channels: int | None = None, dropout: float = 0.1):
        super().__init__(channels, guide_channels)
        width, keys, side = self.guide_channels, self.key_channels, 2 * self.radius + 1
        self.kernel_size = side
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        self.range_proj = nn.Sequential(nn.Conv2d(width, keys, 1), nn.GELU(), nn.Dropout2d(dropout), nn.Conv2d(keys, keys, 1))
        self.fixup_proj = nn.Sequential(
            nn.Conv2d(width + side**2, side**2, 1), nn.GELU(), nn.Dropout2d(dropout), nn.Conv2d(side**2, side**2, 1)
        )
        distances = torch.linspace(-1, 1, side).square()
        self.register_buffer("squared_distances", (distances[:, None] + distances).view(1, -1, 1, 1), persistent=False)

    def kernels(self, guide: Tensor) -> Tensor:
        """Compute the kernels [N, 49, h, w] of a guide [N, guide_channels, h, w]."""
        keys = pad_reflected(self.range_proj(guide), self.radius)
        inside = slice(self.radius, -self.radius)
        similarities = multiply_windows(keys, keys, self.kernel_size, up=1)[..., inside, inside]
        temperature = self.range_temp.exp().clamp(1e-4, 1e4)
        logits = temperature * similarities - self.get_buffer("squared_distances") / (2 * self.sigma_spatial**2)
        kernels = logits.softmax(1)
        return kernels + 0.1 * self.fixup_proj(torch.cat([kernels, guide], dim=1))

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Upsample x [N, C, H, W] under guide [N, guide_channels, h, w] to [N, C, h, w]."""
        guide = prepare_guide(x, guide, self.guide_channels)
        fine = fit(F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False), guide.shape[2:])
        return sum_reflected(fine.to(x.dtype), self.kernels(guide), self.radius)
