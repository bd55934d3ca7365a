"""Upsampling as point sampling: the network predicts where to read the source instead of a kernel for a weighted sum.

This module has DySample. GUM also samples points, and is in guided_samplers.py because it needs a guide. DLU (dlu.py) samples kernels, and
LDA-AQU (local_attention.py) samples the keys and values of an attention.
"""

from collections.abc import Sequence

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels.geometry import memory_format
from .samplers import fit_double, shuffle_pixels

torch.fx.wrap("fit_double")
torch.fx.wrap("shuffle_pixels")


def read_points(x: Tensor, rows: Tensor, columns: Tensor, padding_mode: str = "border") -> Tensor:
    """Read x bilinearly at positions in pixels, where pixel i has its centre at i + 0.5.

    Args:
        x: [N, C, H, W].
        rows, columns: [N, G, Ho, Wo]; each of the G groups of channels has its own.
        padding_mode: what positions outside the map read, "border" or "zeros".

    Returns:
        [N, C, Ho, Wo], in the dtype of x.
    """
    groups = rows.shape[1]
    grid = torch.stack([columns * 2 / x.shape[3] - 1, rows * 2 / x.shape[2] - 1], dim=-1)  # [N, G, Ho, Wo, 2]
    y = F.grid_sample(
        x.to(grid.dtype).unflatten(1, (groups, -1)).flatten(0, 1),
        grid.flatten(0, 1),
        mode="bilinear",
        padding_mode=padding_mode,
        align_corners=False,
    )
    return y.unflatten(0, (-1, groups)).flatten(1, 2).to(x.dtype)


@torch.fx.wrap
def sample(x: Tensor, offsets: Tensor, up: int = 2) -> Tensor:
    """Read x bilinearly at the positions of bilinear interpolation by `up` plus `offsets`; positions outside the map read its border.

    Args:
        x: [N, C, H, W].
        offsets: [N, 2, G, Ho, Wo], to the right and down, in pixels of x; each of the G groups of channels has its own.
        up: output pixels per pixel of x, per side.

    Returns:
        [N, C, Ho, Wo] in the memory format of x.
    """
    height, width = offsets.shape[3:]
    # half precision cannot resolve the positions
    dtype = torch.promote_types(x.dtype, torch.float32)
    columns = (torch.arange(width, device=x.device, dtype=dtype) + 0.5) / up + offsets[:, 0].to(dtype)
    rows = (torch.arange(height, device=x.device, dtype=dtype)[:, None] + 0.5) / up + offsets[:, 1].to(dtype)
    return read_points(x, rows, columns).contiguous(memory_format=memory_format(x))


class DySample(nn.Module):
    """DySample (Liu et al., 2023): bilinear sampling at predicted offsets, per group of channels.

    A 1x1 convolution predicts one offset for each output pixel and group. Style "lp" predicts the four offsets of a source pixel from its
    C channels and then shuffles them to the high resolution; "pl" first shuffles x to C / 4 channels at the high resolution. Offsets are
    scaled by 0.25, so that neighbours do not overlap. With `dynamic_scope` ("DySample+") the scale is 0.5 * sigmoid of a second 1x1
    convolution. "lp" has 8 groups (C + 1) parameters, 8,224 for C = 256 and 4 groups; "pl" has 2 groups (C / 4 + 1); dynamic scope about
    doubles them. An output pixel takes 2 groups C (pl: groups C / 2) + 4 C multiply-adds.

    Args:
        channels: C, divisible by `groups`, and for "pl" also by 4.
        style: "lp" or "pl".
        groups: number of channel groups, each with its own offsets; the authors use 4, and 8 for "pl" with dynamic scope.
        dynamic_scope: whether the scale of the offsets is also predicted.

    Raises:
        ValueError: the style is unknown, or `channels` is not divisible as required.
    """

    def __init__(self, channels: int, style: str = "lp", groups: int = 4, dynamic_scope: bool = False):
        super().__init__()
        if style not in ("lp", "pl"):
            raise ValueError(f'style must be "lp" or "pl", got {style!r}')
        if channels % groups:
            raise ValueError(f"groups must divide channels, got groups={groups} for channels={channels}")
        if style == "pl" and channels % 4:
            raise ValueError(f'channels must be divisible by 4 for style "pl", got {channels}')
        self.style, self.groups = style, groups
        inputs, outputs = (channels, 8 * groups) if style == "lp" else (channels // 4, 2 * groups)
        self.offset = nn.Conv2d(inputs, outputs, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.get_parameter("bias"))
        self.scope = nn.Conv2d(inputs, outputs, 1, bias=False) if dynamic_scope else None
        if self.scope is not None:
            nn.init.zeros_(self.scope.weight)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, C, H, W] to [N, C, 2H, 2W], or to `size`, whose sides may differ from these by 1."""
        source = x if self.style == "lp" else shuffle_pixels(x)
        scope = 0.25 if self.scope is None else 0.5 * self.scope(source).sigmoid()
        offsets = self.offset(source) * scope
        if self.style == "lp":
            offsets = shuffle_pixels(offsets)
        return fit_double(sample(x, offsets.unflatten(1, (2, self.groups))), x, size)
