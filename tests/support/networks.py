"""Small networks, and the counts and random inputs that several tests of networks share."""

from functools import partial
from itertools import pairwise

import torch
from carafepp.models.carafe import CARAFE
from carafepp.models.resnet import ResNet
from torch import Tensor, nn

# the downsampler of the paper's classification networks
NORMED_CARAFE = partial(CARAFE, down=2, compressor_norm=True)
# small samplers for any slot
UP = partial(CARAFE, up=2, compressed_channels=4)
DOWN = partial(CARAFE, down=2, kernel_size=3, compressed_channels=4)


class FloorBackbone(nn.Module):
    """Features of strides 4 to 32 by pools without padding, which round sizes down: 27 rows become 13."""

    out_channels = (4, 6, 8, 10)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(2))
        widths = (4, *self.out_channels)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)) for inputs, outputs in pairwise(widths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        y, levels = self.stem(x), []
        for stage in self.stages:
            y = stage(y)
            levels.append(y)
        return levels


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, whether or not they are trained."""
    return sum(parameter.numel() for parameter in module.parameters())


def small_resnet(**options: object) -> ResNet:
    """A ResNet of one bottleneck in each stage, a sixteenth as wide as published."""
    return ResNet((1, 1, 1, 1), width=4, **options)


def dilated_resnet(**options: object) -> ResNet:
    """A small ResNet whose deepest stages keep stride 8."""
    return ResNet((1, 2, 2, 2), width=4, output_stride=8, **options)


def random_mask(*size: int, share: float = 0.5) -> Tensor:
    """Mask [1, 1, H, W] in float64 of ones at a random `share` of the pixels."""
    return (torch.rand(1, 1, *size) < share).double()


def small_classifier(num_classes: int) -> nn.Module:
    """A network of one CARAFE and two convolutions, from images to logits."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), NORMED_CARAFE(8, kernel_size=3), nn.ReLU(), nn.Conv2d(8, num_classes, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
