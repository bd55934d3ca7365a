"""Downsampling that moves every 2x2 block into channels, so that nothing is lost before a convolution: SPD-Conv and Haar wavelets."""

import torch
import torch.nn as nn
from torch import Tensor

from .guides import pad_to_even


def list_block_pixels(x: Tensor) -> list[Tensor]:
    """List the top left, bottom left, top right and bottom right pixels of the 2x2 blocks of x [N, C, H, W].

    Each is [N, C, ceil(H / 2), ceil(W / 2)]; outside odd maps, pixels are 0.
    """
    even = pad_to_even(x)
    return [even[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]


class SPDConv(nn.Module):
    """SPD-Conv (Sunkara and Luo, ECML PKDD 2022): space to depth, then a convolution of stride 1 from 4 C to C channels.

    The pixels of a 2x2 block become its channels: all top left pixels, then bottom left, top right and bottom right. 4 C^2 K^2 + C
    parameters, 2,359,552 for C = 256, and 4 C^2 K^2 multiply-adds per output pixel. The authors put the convolution that follows in their
    network on the 4 C channels, 1x1 in their ResNet; a slot keeps the channels, so that it is part of the sampler here. The licence of the
    authors' code is MIT.

    Args:
        channels: C.
        kernel_size: K, side of the convolution, odd.
    """

    def __init__(self, channels: int, kernel_size: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(4 * channels, channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x [N, C, H, W] to [N, C, ceil(H / 2), ceil(W / 2)]."""
        return self.conv(torch.cat(list_block_pixels(x), dim=1))


class HWD(nn.Module):
    """Haar wavelet downsampling (Xu et al., Pattern Recognition 2023): the four Haar coefficients of 2x2 blocks, then 1x1 convolution.

    The coefficients of a block with pixels a b / c d are (a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2 and
    (a - b - c + d) / 2. A 1x1 convolution from 4 C to C channels, batch normalisation and ReLU follow. 4 C^2 + 3 C parameters, 262,912 for
    C = 256; 4 C^2 multiply-adds and 16 C additions per output pixel. Outside odd maps, pixels are 0. The state-dict keys, order and signs
    are those of the authors' module, so that its weights load. Their repository states no licence.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv_bn_relu = nn.Sequential(nn.Conv2d(4 * channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x [N, C, H, W] to [N, C, ceil(H / 2), ceil(W / 2)]."""
        a, c, b, d = list_block_pixels(x)
        left_sum, left_difference, right_sum, right_difference = a + c, a - c, b + d, b - d
        coefficients = [
            left_sum + right_sum,
            left_difference + right_difference,
            left_sum - right_sum,
            left_difference - right_difference,
        ]
        return self.conv_bn_relu(torch.cat(coefficients, dim=1) / 2)
