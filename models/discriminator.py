"""The PatchGAN discriminator of image inpainting (paper, section 5.1; Isola et al., 2017)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import spectral_norm


class PatchGAN(nn.Module):
    """Discriminator of image patches: three 4x4 convolutions of stride 2, two of stride 1, leaky ReLU; 2.8 M parameters.

    Two things differ from pix2pix, as in the source of the free-form masks (Yu et al., 2018): spectral normalisation replaces batch
    normalisation, and the mask is a fourth input channel.

    Args:
        width: channels of the first layer; the last hidden layer has 8 times as many.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        channels = [4, width, 2 * width, 4 * width, 8 * width, 1]
        layers = []
        for inputs, outputs, stride in zip(channels, channels[1:], (2, 2, 2, 1, 1), strict=False):
            layers += [spectral_norm(nn.Conv2d(inputs, outputs, 4, stride, padding=1)), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Score images [N, 3, H, W] in [-1, 1] with masks [N, 1, H, W]: one score per patch, [N, 1, h, w], higher for real images.

        Neighbouring scores are about 8 pixels apart, and each covers a patch of 70 x 70 pixels. H and W must be at least 24.
        """
        return self.layers(torch.cat([images, masks], dim=1))


def average_over_hole(scores: Tensor, masks: Tensor) -> Tensor:
    """Average scores [N, 1, h, w] over the cells that overlap the hole in masks [N, 1, H, W].

    Returns:
        [N], 0 for an image without a hole.
    """
    cells = F.adaptive_max_pool2d(masks, scores.shape[2:])
    return (scores * cells).sum((1, 2, 3)) / cells.sum((1, 2, 3)).clamp(min=1)
