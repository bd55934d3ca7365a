"""ReSFU (Zhou et al., 2024): a refreshed similarity-based upsampler, with aligned queries and keys and fine-grained neighbours."""

import math

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels.borders import mask_outside
from ..kernels.geometry import Spec
from .guides import Guided, prepare_guide, sum_windows
from .samplers import fit, upsample_bilinear

torch.fx.wrap("fit")
torch.fx.wrap("prepare_guide")
torch.fx.wrap("sum_windows")


def blur(x: Tensor) -> Tensor:
    """Convolve every channel of x [N, M, H, W] with a 3x3 Gaussian of standard deviation 1; beyond the map, the nearest pixel is read."""
    side = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = side * (x[..., :-2, :] + x[..., 2:, :]) + (1 - 2 * side) * x[..., 1:-1, :]
    return side * (x[..., :-2] + x[..., 2:]) + (1 - 2 * side) * x[..., 1:-1]


def filter_guided(x: Tensor, guide: Tensor, radius: int = 4, epsilon: float = 1e-3) -> Tensor:
    """Smooth x [N, M, H, W] along the edges of a guide [N, M, H, W] (fast guided filter, He and Sun, 2015).

    Channel by channel, x is fitted by a linear function of the guide in windows of every second pixel, `radius` of them to each side. The
    coefficients are averaged over the windows of a pixel and upsampled bilinearly.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    # in half precision, the differences of means would lose their digits
    x, guide = x.to(dtype), guide.to(dtype)
    x_small, guide_small = x[..., ::2, ::2], guide[..., ::2, ::2]

    def average(y: Tensor) -> Tensor:
        return F.avg_pool2d(y, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)

    x_mean, guide_mean = average(x_small), average(guide_small)
    covariance = average(x_small * guide_small) - x_mean * guide_mean
    variance = average(guide_small.square()) - guide_mean.square()
    slope = covariance / (variance + epsilon)
    intercept = x_mean - slope * guide_mean
    slope, intercept = (fit(upsample_bilinear(average(y)), x.shape[2:]) for y in (slope, intercept))
    return slope * guide + intercept


class PairedDifferences(nn.Module):
    """Similarity of a query to the keys around it, by a paired central difference convolution.

    A 3x3 convolution of dilation 2 applies to the differences of the keys and the query at its centre; both are normalised by the same
    layer. Two 1x1 convolutions turn its `hidden` channels into one score per key. 9 E hidden / 4 + hidden^2 / 4 + 13 hidden + 2 E + 9
    parameters.

    Args:
        channels: E, the channels of queries and keys, a multiple of 8.
        kernel_size: side of the window of keys, odd.
        hidden: channels between the convolutions.
    """

    def __init__(self, channels: int, kernel_size: int, hidden: int = 128):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.weight = nn.Parameter(torch.empty(hidden, channels // 4, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(1, hidden, 1, 1))
        self.channel_compressor = nn.Sequential(
            nn.ReLU(), nn.Conv2d(hidden, hidden, 1, groups=4), nn.ReLU(), nn.GroupNorm(8, hidden), nn.Conv2d(hidden, kernel_size**2, 1)
        )
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, keys: Tensor, queries: Tensor) -> Tensor:
        """Compute the scores [N, K * K, h, w] of keys and queries [N, E, h, w]."""
        radius = self.weight.shape[2] // 2
        keys = F.pad(self.norm(keys), (2 * radius,) * 4, mode="replicate")
        at_keys = F.conv2d(keys, self.weight, dilation=2, groups=4)
        at_queries = F.conv2d(self.norm(queries), self.weight.sum((2, 3), keepdim=True), groups=4)
        return self.channel_compressor(at_keys - at_queries + self.bias)


def spread_weights(weights: Tensor, rows: bool) -> Tensor:
    """Spread weights of pixels of a map that is upsampled by 2 over the pixels of the map, along rows or columns.

    An upper (left) fine pixel lies a quarter of a pixel before the centre of its pixel, a lower (right) one a quarter behind it. A weight
    therefore belongs to its pixel by 3 / 4, and by 1 / 4 to the pixel before or behind.

    Args:
        weights: [N, K, L, h, w], of windows around every fine pixel.
        rows: whether the K rows of the windows become K + 2, instead of the L columns L + 2.
    """
    axis = 3 if rows else 4
    place = torch.arange(weights.shape[axis], device=weights.device)
    is_upper = (place % 2 == 0).view(-1, *[1] * (4 - axis))
    before, at, behind = (F.pad(weights, [0] * (6 if rows else 4) + [i, 2 - i]) for i in range(3))
    return 0.75 * at + 0.25 * torch.where(is_upper, before, behind)


@torch.fx.wrap
def attend_bilinearly(x: Tensor, scores: Tensor) -> Tensor:
    """Average the bilinearly upsampled x at K x K neighbours of every fine pixel, 2 fine pixels apart, with the softmax of their scores.

    Neighbours outside the upsampled map are left out. The others lie between pixels of x, over which their weights are spread: the result
    is a sum over (K + 2) x (K + 2) pixels of x, and no map of C channels is upsampled.

    Args:
        x: [N, C, H, W].
        scores: [N, K * K, h, w], where h is 2H - 1, 2H or 2H + 1, and w is 2W - 1, 2W or 2W + 1. Those beyond 2H x 2W are not read.

    Returns:
        [N, C, h, w]. Row 2H and column 2W repeat those before them.
    """
    side = math.isqrt(scores.shape[1])
    weights = mask_outside(scores[:, None], Spec(side, up=2), *x.shape[2:]).softmax(2)[:, 0].unflatten(1, (side, side))
    weights = spread_weights(spread_weights(weights, rows=True), rows=False).flatten(1, 2)  # [N, (K + 2)**2, h, w]
    return sum_windows(x, weights, side + 2, border="replicate")


class ReSFU(Guided):
    """ReSFU: attention of fine pixels over neighbours in the upsampled map, by learned similarities of aligned queries and keys.

    The normalised guide and x are embedded by 1x1 convolutions to queries Q and, upsampled bilinearly, to keys K. The scores of 3x3
    neighbours are the sum of two `PairedDifferences`: of K and of K smoothed along the edges of Q (`filter_guided`), for semantics, and of
    Q blurred and Q itself, for details. Neighbours are one pixel of x apart around the fine pixel itself, instead of pixels of x, which
    avoids blocks in the output. Those outside the map are left out.

    With E = 32: 34 (C + C_guide) + 30,162 parameters, 47,570 for C = C_guide = 256. Written from the formulas of the paper
    (arXiv:2407.02283) and of the authors' code (github.com/zmhhmz/ReSFU, without a licence). There, groups of normalised channels must
    divide them; here, the number of groups is the greatest common divisor of 32 and the channels.

    Args:
        channels: C, the channels of x.
        guide_channels: C_guide, the channels of the guide; None means C.
        embedding: E, the channels of queries and keys, a multiple of 8.

    Raises:
        ValueError: `embedding` is not a multiple of 8.
    """

    kernel_size = 3

    def __init__(self, channels: int, guide_channels: int | None = None, embedding: int = 32):
        super().__init__(channels, guide_channels)
        if embedding < 8 or embedding % 8:
            raise ValueError(f"embedding must be a multiple of 8, got {embedding}")
        side = self.kernel_size
        self.norm_x = nn.GroupNorm(math.gcd(32, channels), channels)
        self.norm_y = nn.GroupNorm(math.gcd(32, self.guide_channels), self.guide_channels)
        self.q = nn.Conv2d(self.guide_channels, embedding, 1)
        self.k = nn.Conv2d(channels, embedding, 1)
        self.semantic_scores, self.detail_scores = (PairedDifferences(embedding, side) for _ in range(2))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.get_parameter("bias"))

    def scores(self, x: Tensor, guide: Tensor) -> Tensor:
        """Compute the scores [N, 9, h, w] of the neighbours of every fine pixel."""
        queries = self.q(self.norm_y(guide))
        keys = fit(upsample_bilinear(self.k(self.norm_x(x))), guide.shape[2:])
        semantic = self.semantic_scores(keys, filter_guided(keys, queries).to(keys.dtype))
        return semantic + self.detail_scores(blur(queries), queries)

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Upsample x [N, C, H, W] under guide [N, guide_channels, h, w] to [N, C, h, w]."""
        guide = prepare_guide(x, guide, self.guide_channels)
        return attend_bilinearly(x, self.scores(x, guide))
