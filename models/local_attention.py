"""Local deformable attention as an upsampler: queries at the target size, keys and values at learned points around each target."""

import functools
import operator
from collections.abc import Sequence

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels.geometry import memory_format
from .point_samplers import read_points
from .samplers import fit_double

torch.fx.wrap("fit_double")


class _ChannelNorm(nn.Module):
    """Layer normalisation over the channels of a map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


@torch.fx.wrap
def _upsample_corners(x: Tensor) -> Tensor:
    """Upsample x [N, C, H, W] to [N, C, 2H, 2W], bilinearly with the corners of both maps aligned."""
    return F.interpolate(x, (2 * x.shape[2], 2 * x.shape[3]), mode="bilinear", align_corners=True)


@torch.fx.wrap
def _attend(queries: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
    """Sum the values at the points of each query, weighted by the softmax of its products with the keys there.

    Target (i, j) of 2H x 2W lies in row i (H - 1) / (2H - 1) of the source, and likewise in its column, so that corners meet corners.
    Points outside the map read zeros. The points are read one after the other, so that inference holds no copy of the map for every point.

    Args:
        queries: [N, E, 2H, 2W].
        keys: [N, E, H, W].
        values: [N, C, H, W].
        offsets: [N, G, T, 2, 2H, 2W], down and to the right, in target pixels, of T points; each of the G groups of channels has its own.
        bias: [T, E], added to the keys of a point.

    Returns:
        [N, C, 2H, 2W] in the memory format of values.
    """
    (height, width), (rows, columns) = keys.shape[2:], queries.shape[2:]
    down = torch.arange(rows, device=keys.device)[:, None] + offsets[:, :, :, 0]
    across = torch.arange(columns, device=keys.device) + offsets[:, :, :, 1]
    down, across = down * (height - 1) / (rows - 1) + 0.5, across * (width - 1) / (columns - 1) + 0.5
    points = range(bias.shape[0])

    def read(x: Tensor, point: int) -> Tensor:
        return read_points(x, down[:, :, point], across[:, :, point], padding_mode="zeros")

    logits = [((read(keys, point) + bias[point, :, None, None]) * queries).sum(1, keepdim=True) for point in points]
    weights = torch.cat(logits, dim=1).softmax(1).to(values.dtype)  # [N, T, 2H, 2W]
    y = functools.reduce(operator.add, (weights[:, point : point + 1] * read(values, point) for point in points))
    return y.contiguous(memory_format=memory_format(values))


class LDAAQU(nn.Module):
    """LDA-AQU (Du et al., ACM MM 2024): local attention, whose query chooses where its K x K neighbours are.

    Queries and keys are 1x1 convolutions of the normalised x to E = C / `reduction` channels; queries are upsampled bilinearly. From the
    query, two 3x3 convolutions, the first depthwise, with normalisation and GELU between them, predict an offset of each neighbour, at most
    `offset_range` target pixels, for each group of channels. The output is the sum of x at the neighbours, weighted by the softmax of
    query times key. A learned vector for each neighbour is added to its key. As the authors do, positions align the corners of both maps,
    so that features move by up to half a target pixel towards the middle of the map, and points outside the map read zeros.

    2 C E + (E / G) (9 + 18 K^2 + 2) + 2 K^2 + K^2 E + 2 C parameters, 39,410 for C = 256, as published. An output pixel takes
    E (C / 2 + 9 + 18 K^2 + K^2) + K^2 C multiply-adds and K^2 bilinear readings of C + E channels. The state-dict keys are those of the
    authors' module, whose `relative_position_bias_table` has the shape [1, 1, 1, K^2, E] instead of [K^2, E]. The authors' repository is
    a copy of MMDetection, whose licence is Apache-2.0.

    Args:
        channels: C, divisible by `reduction * groups`.
        kernel_size: K; the authors use 3.
        reduction: C / E.
        groups: G, number of channel groups, each with its own offsets.
        offset_range: largest offset in target pixels.

    Raises:
        ValueError: `channels` is not divisible as required.
    """

    def __init__(self, channels: int, kernel_size: int = 3, reduction: int = 4, groups: int = 2, offset_range: float = 11):
        super().__init__()
        if channels % (reduction * groups):
            raise ValueError(f"channels must be divisible by reduction * groups = {reduction * groups}, got {channels}")
        embedding, points = channels // reduction, kernel_size**2
        self.groups, self.offset_range = groups, offset_range
        self.layer_norm = _ChannelNorm(channels)
        self.proj_q = nn.Conv2d(channels, embedding, 1, bias=False)
        self.proj_k = nn.Conv2d(channels, embedding, 1, bias=False)
        width = embedding // groups
        self.conv_offset = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            _ChannelNorm(width),
            nn.GELU(),
            nn.Conv2d(width, 2 * points, 3, padding=1),
        )
        self.relative_position_bias_table = nn.Parameter(torch.zeros(points, embedding))
        around = torch.arange(kernel_size) - kernel_size // 2
        neighbours = torch.cartesian_prod(around, around).view(points, 2, 1, 1).float()  # row by row; down, right
        self.register_buffer("neighbours", neighbours, persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        for parameter in self.conv_offset[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, C, H, W] to [N, C, 2H, 2W], or to `size`, whose sides may differ from these by 1."""
        normalised = self.layer_norm(x)
        queries, keys = _upsample_corners(self.proj_q(normalised)), self.proj_k(normalised)
        predicted = self.conv_offset(queries.unflatten(1, (self.groups, -1)).flatten(0, 1)).unflatten(1, (-1, 2))
        # half precision cannot resolve the positions
        predicted = predicted.to(torch.promote_types(x.dtype, torch.float32)).tanh() * self.offset_range + self.neighbours
        offsets = predicted.unflatten(0, (-1, self.groups))  # [N, G, K * K, 2, 2H, 2W]
        scaled = queries * queries.shape[1] ** -0.5
        return fit_double(_attend(scaled, keys, x, offsets, self.relative_position_bias_table), x, size)
