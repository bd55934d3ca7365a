"""The PatchGAN discriminator of image inpainting (paper, section 5.1; Isola et al., 2017)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import spectral_norm


class PatchGAN(nn.Module):
    """Judge each patch of a completed image: three 4x4 convolutions of stride 2, two of stride 1, leaky ReLU; 2.8 M parameters.

    Spectral normalisation instead of pix2pix's batch normalisation, and the mask as a fourth channel, as in the work that the free-form
    masks come from (Yu et al., 2018).

    Args:
        width: channels of the first layer; 8 times as many in the last.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        channels = [4, width, 2 * width, 4 * width, 8 * width, 1]
        layers = []
        for inputs, outputs, stride in zip(channels, channels[1:], (2, 2, 2, 1, 1), strict=False):
            layers += [spectral_norm(nn.Conv2d(inputs, outputs, 4, stride, padding=1)), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] and masks [N, 1, H, W] -> a score a patch, [N, 1, h, w], the larger the more real.

        One cell is about 8 pixels, its patch 70. H and W of 24 pixels or more.
        """
        return self.layers(torch.cat([images, masks], dim=1))


def inpainted(scores: Tensor, masks: Tensor) -> Tensor:
    """Average the scores [N, 1, h, w] of those cells that the hole of masks [N, 1, H, W] touches -> [N], 0 without a hole."""
    cells = F.adaptive_max_pool2d(masks, scores.shape[2:])
    return (scores * cells).sum((1, 2, 3)) / cells.sum((1, 2, 3)).clamp(min=1)
