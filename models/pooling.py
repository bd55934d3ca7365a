"""Weighted pooling: blur pooling, SoftPool, DPP, LIP and IndexNet's pooling (Table III and later methods).

Except in blur pooling, every channel has its own weights, which depend on the values of the map. `carafepp.kernels.reassemble` with
groups = C computes the same sums, but it reads the weights of all windows, 9 / 4 times the size of the map in each pass. Average pools of
the weights and of the weighted features read only the map itself. On a CPU, they are as fast as `reassemble` at 64 channels, and 2 to 10
times faster at 1024 channels or in channels_last.
"""

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .guides import pad_to_even
from .samplers import shuffle_pixels, upsample_nearest

torch.fx.wrap("shuffle_pixels")


def _pool_weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Compute the mean of x, weighted by `weights`, over blocks of 2x2; blocks at the bottom and right of odd maps are smaller."""
    return F.avg_pool2d(x * weights, 2, ceil_mode=True) / F.avg_pool2d(weights, 2, ceil_mode=True)


def _cut_blocks(y: Tensor, x: Tensor) -> Tensor:
    """Cut y, of the size of the 2x2 blocks of x [N, C, H, W], to the size of x."""
    # negative padding crops; a slice would restrict an exported program to even or to odd maps
    return F.pad(y, (0, -(x.shape[3] % 2), 0, -(x.shape[2] % 2)))


def _repeat_in_blocks(cells: Tensor, x: Tensor) -> Tensor:
    """Repeat the values of 2x2 blocks, [N, C, ceil(H / 2), ceil(W / 2)], at the pixels of x [N, C, H, W]."""
    return _cut_blocks(upsample_nearest(cells), x)


@torch.fx.wrap
def _blur(x: Tensor, kernel: Tensor, padding: tuple[int, int]) -> Tensor:
    """Filter every channel of x [N, C, H, W] by `kernel` [1, 1, k, k] at stride 2; `padding` is that before and after a row."""
    # reflection needs a map larger than the padding
    mode = "reflect" if min(x.shape[2:]) > max(padding) else "replicate"
    padded = F.pad(x, padding * 2, mode=mode)
    return F.conv2d(padded, kernel.expand(x.shape[1], -1, -1, -1).to(x.dtype), stride=2, groups=x.shape[1])


class BlurPool(nn.Module):
    """Blur pooling (Zhang, 2019): a fixed binomial low-pass filter at every other pixel, with reflected borders. No parameters.

    The filter is the outer product of a row of Pascal's triangle with itself: 1 3 3 1 for the authors' default `kernel_size` of 4, which
    takes 16 multiply-adds per output element.

    Args:
        channels: not used, because the filter is the same for all channels.
        kernel_size: side of the filter.
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
        """Downsample x [N, C, H, W] to [N, C, ceil(H / 2), ceil(W / 2)]."""
        return _blur(x, self.kernel, self.padding)


class SoftPool(nn.Module):
    """SoftPool (Stergiou et al., 2021): sum of 2x2 blocks, weighted by the softmax of their own values, per channel. No parameters.

    out = sum_q exp(x_q) x_q / sum_q exp(x_q). The maximum of the block is subtracted from the exponents, so that nothing overflows.
    4 exponentials and 8 multiply-adds per output element.
    """

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x [N, C, H, W] to [N, C, ceil(H / 2), ceil(W / 2)]."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        maxima = F.max_pool2d(values.detach(), 2, ceil_mode=True)
        return _pool_weighted(values, (values - _repeat_in_blocks(maxima, x)).exp()).to(x.dtype)


class IndexPool(nn.Module):
    """Indexed pooling, the encoder side of IndexNet (Lu et al., ICCV 2019): sum of 2x2 blocks with learned weights, per channel.

    The weights of a block are the softmax over its pixels of the index map, the sigmoid of a 4x4 convolution of stride 2 from x to 4 C
    channels, rearranged from depth to space. This is the "many-to-one", linear form with context, as in `guided_samplers.IndexNet`. The
    weights of a block that extends beyond an odd map sum to 1 over the pixels inside. 64 C^2 parameters, 4.2 M for C = 256, and 64 C^2
    multiply-adds per output pixel. The licence of the authors' code allows academic use only; this class was not taken from it.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.index = nn.Conv2d(channels, 4 * channels, 4, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x [N, C, H, W] to [N, C, ceil(H / 2), ceil(W / 2)]."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        index = shuffle_pixels(self.index(pad_to_even(x)).to(values.dtype).sigmoid())
        return _pool_weighted(values, _cut_blocks(index, x).exp()).to(x.dtype)


class DPP(nn.Module):
    """Detail-preserving pooling (Saeedan et al., 2018): pixels weigh more the further they are from a smooth guide.

    Over blocks of 2x2, out_p = sum_q w_pq x_q / sum_q w_pq with w_pq = alpha + rho(x_q - guide_p) and
    rho(d) = (d^2 + eps)^(lambda / 2). The asymmetric form takes rho(max(d, 0)), which rewards only pixels above the guide. alpha and
    lambda are positive and learned per channel, as exponentials of parameters that start at 0; train these without weight decay.
    eps = 1e-3 as in the authors' code, which also divides the rewards of a block by their mean; this class does not. 2 C parameters,
    11 C with the full guide; 4 powers and about 30 FLOPs per output element.

    Args:
        channels: C.
        guide: "lite" is the mean of the block, "full" is a learned 3x3 filter of stride 2 per channel.
        symmetric: whether differences of both signs are rewarded.

    Raises:
        ValueError: the guide is unknown.
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
        """Downsample x [N, C, H, W] to [N, C, ceil(H / 2), ceil(W / 2)]."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        difference = values - _repeat_in_blocks(self.guide(x).to(values.dtype), x)
        if not self.symmetric:
            difference = difference.relu()
        alpha, power = self.log_alpha.exp()[:, None, None], self.log_lambda.exp()[:, None, None]
        weights = alpha + (difference.square() + 1e-3).pow(power / 2)
        return _pool_weighted(values, weights).to(x.dtype)


class LIP(nn.Module):
    """Local importance pooling (Gao et al., 2019): sum of 3x3 windows at stride 2, weighted by learned importances, per channel.

    out_p = sum_q exp(l_q) x_q / sum_q exp(l_q), with logits l = 12 sigmoid(norm(conv(x))) of the size of x. The last convolution starts
    at 0, so that the layer starts as average pooling. Simplified logits come from one 3x3 convolution, 9 C^2 + 2 C parameters.
    Bottleneck logits first go through a 1x1 and a 3x3 convolution of `bottleneck` channels B, 2 B C + 9 B^2 + 4 B + 2 C parameters. In a
    residual block of this package's ResNet, `PairedLIP` shares these two convolutions between main path and shortcut, as the authors do.
    Normalisation is per image and channel. The convolutions run at the resolution of the input and take, per output pixel, 36 C^2
    multiply-adds for simplified logits and 8 B C + 36 B^2 for bottleneck logits.

    Args:
        channels: C.
        bottleneck: None selects simplified logits, and so does a value greater than `channels`. 128 gives the authors' ResNet, with
            simplified logits in the stem's 64 channels and `PairedLIP` in the blocks.
    """

    def __init__(self, channels: int, bottleneck: int | None = None):
        super().__init__()
        if bottleneck and bottleneck > channels:
            bottleneck = None
        shared = _make_bottleneck(channels, bottleneck) if bottleneck else []
        self.logits = nn.Sequential(*shared, *_make_logits(bottleneck or channels, channels, 1 if bottleneck else 3))

    @staticmethod
    def make_pair(inputs: int, width: int, bottleneck: int | None = None) -> "PairedLIP | None":
        """Make the sampler of both paths of a residual block, from the options of this class; None for simplified logits."""
        return PairedLIP(inputs, width, bottleneck) if bottleneck else None

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x [N, C, H, W] to [N, C, ceil(H / 2), ceil(W / 2)]."""
        return _pool_by_importance(x, self.logits(x))


class PairedLIP(nn.Module):
    """LIP of a residual block in the authors' ResNet: main path and shortcut take their importances from the input of the block.

    A 1x1 and a 3x3 convolution of `bottleneck` channels are shared, and a 1x1 convolution for each path gives its logits. A 1x1 convolution
    replaces the 3x3 of the block. ResNet-50 then has 23.9 M parameters with 1000 classes, as published.

    Args:
        inputs: channels of the input of the block, which is also the input of the shortcut.
        width: channels of the main path.
        bottleneck: channels of the shared convolutions.
    """

    def __init__(self, inputs: int, width: int, bottleneck: int):
        super().__init__()
        self.shared = nn.Sequential(*_make_bottleneck(inputs, bottleneck))
        self.shortcut_logits = nn.Sequential(*_make_logits(bottleneck, inputs, 1))
        self.main_logits = nn.Sequential(*_make_logits(bottleneck, width, 1))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Downsample the input of a block x [N, inputs, H, W] and the map of its main path y [N, width, H, W] by 2."""
        shared = self.shared(x)
        return _pool_by_importance(x, self.shortcut_logits(shared)), _pool_by_importance(y, self.main_logits(shared))


def _make_bottleneck(channels: int, bottleneck: int) -> list[nn.Module]:
    """Make the convolutions before the logits: 1x1 and 3x3, each with normalisation and ReLU."""
    layers: list[nn.Module] = []
    for inputs, size in ((channels, 1), (bottleneck, 3)):
        conv = nn.Conv2d(inputs, bottleneck, size, padding=size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.InstanceNorm2d(bottleneck, affine=True), nn.ReLU(inplace=True)]
    return layers


def _make_logits(inputs: int, channels: int, kernel_size: int) -> list[nn.Module]:
    """Make the last convolution of logits, which starts at 0, with normalisation and sigmoid."""
    conv = nn.Conv2d(inputs, channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.zeros_(conv.weight)
    return [conv, nn.InstanceNorm2d(channels, affine=True), nn.Sigmoid()]


def _pool_by_importance(x: Tensor, gates: Tensor) -> Tensor:
    """Pool x [N, C, H, W] in 3x3 windows at stride 2, weighted by exp(12 gates), with gates [N, C, H, W] in [0, 1]."""
    # exp(12) exceeds the range of float16
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights = (12 * gates.to(dtype)).exp()
    y = F.avg_pool2d(x.to(dtype) * weights, 3, stride=2, padding=1) / F.avg_pool2d(weights, 3, stride=2, padding=1)
    return y.to(x.dtype)
