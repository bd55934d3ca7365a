"""Samplers with learned kernels that are the same everywhere, and spatial attention (Tables III, IV and VI)."""

from collections.abc import Sequence

import torch.fx
import torch.nn as nn
from torch import Tensor

from .samplers import fit_double, shuffle_pixels, upsample_bilinear, upsample_nearest

torch.fx.wrap("fit_double")
torch.fx.wrap("shuffle_pixels")


class StridedConv(nn.Conv2d):
    """3x3 convolution of stride 2, C to C channels: learned downsampling with the same kernel everywhere.

    9 C^2 + C parameters, 9 C^2 multiply-adds per output pixel. This sampler comes before the network's own convolution. The strided
    convolution of the paper's Table III is a different case: the published network (an empty slot), whose own convolution has the stride.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=3, stride=2, padding=1)


class NearestConv(nn.Conv2d):
    """Nearest-neighbour interpolation followed by a 3x3 convolution at the high resolution ("N.C.").

    9 C^2 + C parameters, 590,080 for C = 256; 9 C^2 multiply-adds per output pixel.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, C, H, W] to [N, C, 2H, 2W], or to `size`, whose sides may differ from these by 1."""
        return fit_double(super().forward(upsample_nearest(x)), x, size)


class BilinearConv(nn.Conv2d):
    """Bilinear interpolation followed by a 3x3 convolution at the high resolution ("B.C.").

    9 C^2 + C parameters, 590,080 for C = 256; 9 C^2 multiply-adds per output pixel.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, C, H, W] to [N, C, 2H, 2W], or to `size`, whose sides may differ from these by 1."""
        return fit_double(super().forward(upsample_bilinear(x)), x, size)


class Deconv(nn.ConvTranspose2d):
    """Deconvolution: transposed 3x3 convolution of stride 2 (Noh et al., 2015). 9 C^2 + C parameters, 590,080 for C = 256.

    The four phases of the output see 1, 2, 2 and 4 taps. That is 9 / 4 C^2 multiply-adds per output pixel, a quarter of a convolution
    after an interpolation, and can leave a checkerboard pattern.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=3, stride=2, padding=1, output_padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, C, H, W] to [N, C, 2H, 2W], or to `size`, whose sides may differ from these by 1."""
        return fit_double(super().forward(x), x, size)


class PixelShuffle(nn.Conv2d):
    """Pixel shuffle ("P.S.", Shi et al., 2016): a 3x3 convolution to 4 C channels, rearranged from depth to space.

    36 C^2 + 4 C parameters, 2,360,320 for C = 256; 9 C^2 multiply-adds per output pixel. The initialisation is that of mmcv's
    PixelShufflePack: Xavier uniform, zero bias.
    """

    def __init__(self, channels: int):
        super().__init__(channels, 4 * channels, kernel_size=3, padding=1)

    def reset_parameters(self) -> None:
        """Initialise as mmcv does."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.get_parameter("bias"))

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, C, H, W] to [N, C, 2H, 2W], or to `size`, whose sides may differ from these by 1."""
        return fit_double(shuffle_pixels(super().forward(x)), x, size)


class SpatialAttention(nn.Module):
    """Spatial attention ("S.A.", after SCA-CNN, Chen et al., 2017): one predicted factor per location rescales the upsampled features.

    y = bilinear(x); out = y * sigmoid(conv3x3(y)), with one output channel. 9 C + 1 parameters, 9 C multiply-adds per output pixel
    in addition to the interpolation. The paper gives no formula. This form has the 2.3 K parameters and 28 K FLOPs per source pixel that
    the paper compares CARAFE with for C = 256.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.attention = nn.Conv2d(channels, 1, kernel_size=3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, C, H, W] to [N, C, 2H, 2W], or to `size`, whose sides may differ from these by 1."""
        y = upsample_bilinear(x)
        return fit_double(y * self.attention(y).sigmoid(), x, size)
