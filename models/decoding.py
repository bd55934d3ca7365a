"""What the segmentation networks' decoders share."""

import torch.nn as nn
from torch import Tensor

from .samplers import resize


def conv_bn_relu(inputs: int, outputs: int, kernel_size: int) -> nn.Sequential:
    """Convolution, batch norm and ReLU, initialised as in UperNet's public implementation."""
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
    norm = nn.BatchNorm2d(outputs)
    nn.init.kaiming_normal_(conv.weight)
    nn.init.constant_(norm.bias, 1e-4)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True))


def classifier(inputs: int, dim: int, num_classes: int) -> nn.Sequential:
    """3x3 convolution to `dim` channels, dropout and a classifier of pixels, as in PSPNet's and PSANet's public implementations."""
    last = nn.Conv2d(dim, num_classes, 1)
    nn.init.kaiming_normal_(last.weight)
    return nn.Sequential(*conv_bn_relu(inputs, dim, 3), nn.Dropout2d(0.1), last)


def enlarge_cells(cells: Tensor, size: tuple[int, int], sampler: nn.Module | None, guide: Tensor) -> Tensor:
    """Bring pooled cells [N, C, h, w] to `size`: bilinearly, or with a sampler to half of it bilinearly and then by 2 (section 4.2)."""
    if sampler is not None:
        cells = resize(cells, ((size[0] + 1) // 2, (size[1] + 1) // 2), None)
    return resize(cells, size, sampler, guide)
