"""Pooling under weights: blur pooling, SoftPool, DPP and LIP (Table III and what today's users add to it).

In all but the first every channel has weights of its own, which depend on its values. That makes them gather-weighted sums, but with one
kernel per channel: `carafepp.kernels.reassemble` with groups = C gives the same result from the weights of all windows, 9 / 4 of the map's
size for each of its passes, where pools of the weights and of the weighted features read the map itself. On a CPU the pools are as fast at
64 channels, and 2 to 10 times faster at 1024 channels or in channels_last.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .samplers import nearest


def _weighted_pool(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted means over blocks of 2x2, which are smaller at the bottom and right of odd maps."""
    return F.avg_pool2d(x * weights, 2, ceil_mode=True) / F.avg_pool2d(weights, 2, ceil_mode=True)


def _at_blocks(cells: Tensor, x: Tensor) -> Tensor:
    """Repeat one value per 2x2 block of `x` at its pixels."""
    # cropped by negative padding: a slice would tie an exported program to maps of one parity
    return F.pad(nearest(cells), (0, -(x.shape[3] % 2), 0, -(x.shape[2] % 2)))


class BlurPool(nn.Module):
    """Blur pooling (Zhang, 2019): a fixed binomial low-pass filter, then every other pixel; reflected borders. No parameters.

    The filter is the outer product of a row of Pascal's triangle: 1 3 3 1 for the authors' default `kernel_size` of 4,
    16 multiply-adds per output element.
    """

    kernel: Tensor

    def __init__(self, channels: int, kernel_size: int = 4):
        super().__init__()
        row = torch.ones(1)
        for _ in range(kernel_size - 1):
            row = F.pad(row, (1, 0)) + F.pad(row, (0, 1))
        row /= row.sum()
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)
        self.padding = (kernel_size - 1) // 2, kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)]."""
        # a map that is too small to be reflected repeats its border
        mode = "reflect" if min(x.shape[2:]) > max(self.padding) else "replicate"
        padded = F.pad(x, self.padding * 2, mode=mode)
        return F.conv2d(padded, self.kernel.expand(x.shape[1], -1, -1, -1).to(x.dtype), stride=2, groups=x.shape[1])


class SoftPool(nn.Module):
    """SoftPool (Stergiou et al., 2021): blocks of 2x2 summed under the softmax of their own values, per channel. No parameters.

    out = sum_q exp(x_q) x_q / sum_q exp(x_q), with the block's maximum subtracted from the exponents, so that nothing overflows. 4
    exponentials and 8 multiply-adds per output element.
    """

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)]."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        maxima = F.max_pool2d(values.detach(), 2, ceil_mode=True)
        return _weighted_pool(values, (values - _at_blocks(maxima, x)).exp()).to(x.dtype)


class DPP(nn.Module):
    """Detail-preserving pooling (Saeedan et al., 2018): pixels weigh more the further they are from a smooth guide.

    Over blocks of 2x2, out_p = sum_q w_pq x_q / sum_q w_pq with w_pq = alpha + rho(x_q - guide_p) and
    rho(d) = (d^2 + eps)^(lambda / 2); asymmetric, rho(max(d, 0)) rewards only pixels above the guide. alpha and lambda are positive and
    learned per channel, as exponentials of parameters that start at 0 (and are meant to be trained without weight decay);
    eps = 1e-3 as in the authors' code, which in addition divides the rewards of a block by their mean. 2 C parameters, 11 C with the
    full guide; 4 powers and about 30 FLOPs per output element.

    Args:
        channels: C.
        guide: "lite" is the mean of the block, "full" a learned 3x3 filter of stride 2 per channel.
        symmetric: reward differences of both signs.

    Raises:
        ValueError: an unknown guide.
    """

    def __init__(self, channels: int, guide: str = "lite", symmetric: bool = True):
        super().__init__()
        if guide not in ("lite", "full"):
            raise ValueError(f'guide must be "lite" or "full", got {guide!r}')
        self.symmetric = symmetric
        self.guide = nn.AvgPool2d(2, ceil_mode=True)
        if guide == "full":
            self.guide = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False)
        self.log_alpha = nn.Parameter(torch.zeros(channels))
        self.log_lambda = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)]."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        difference = values - _at_blocks(self.guide(x).to(values.dtype), x)
        if not self.symmetric:
            difference = difference.relu()
        alpha, power = self.log_alpha.exp()[:, None, None], self.log_lambda.exp()[:, None, None]
        weights = alpha + (difference.square() + 1e-3).pow(power / 2)
        return _weighted_pool(values, weights).to(x.dtype)


class LIP(nn.Module):
    """Local importance pooling (Gao et al., 2019): windows of 3x3 at stride 2 summed under learned importances, per channel.

    out_p = sum_q exp(l_q) x_q / sum_q exp(l_q), with logits l = 12 sigmoid(norm(conv(x))) of the size of x. The last convolution starts
    at 0, which is average pooling. Simplified logits are one 3x3 convolution, 9 C^2 + 2 C parameters; bottleneck logits go through a
    1x1 and a 3x3 convolution of `bottleneck` channels B first, 2 B C + 9 B^2 + 4 B + 2 C parameters (the authors share the part before
    the last convolution between the two samplers of a residual block; here each has its own). Normalisation is per image and channel.
    The convolutions run at the input's resolution: 36 C^2 multiply-adds per output pixel simplified, 8 B C + 36 B^2 with a bottleneck.

    Args:
        channels: C.
        bottleneck: None for simplified logits, which fewer channels than `bottleneck` have too: 128 is the authors' ResNet, with simplified
            logits in the stem's 64 channels and bottlenecks elsewhere.
    """

    def __init__(self, channels: int, bottleneck: int | None = None):
        super().__init__()
        if bottleneck and bottleneck > channels:
            bottleneck = None
        width = bottleneck or channels
        project = nn.Conv2d(width, channels, 1 if bottleneck else 3, padding=0 if bottleneck else 1, bias=False)
        nn.init.zeros_(project.weight)
        layers = [project, nn.InstanceNorm2d(channels, affine=True)]
        if bottleneck:
            for inputs, size in ((bottleneck, 3), (channels, 1)):
                conv = nn.Conv2d(inputs, bottleneck, size, padding=size // 2, bias=False)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                layers = [conv, nn.InstanceNorm2d(bottleneck, affine=True), nn.ReLU(inplace=True), *layers]
        self.logits = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)]."""
        # exp(12) is more than float16 holds
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = (12 * self.logits(x).to(dtype)).exp()
        y = F.avg_pool2d(x.to(dtype) * weights, 3, stride=2, padding=1) / F.avg_pool2d(weights, 3, stride=2, padding=1)
        return y.to(x.dtype)
