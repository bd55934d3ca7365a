"""Upsamplers whose window weights come from the guide alone: UPLiFT's local attender.

The features themselves have no part in the weights, so that any features get the edges of the guide.
"""

from collections.abc import Callable

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .guides import Guided, prepare_guide, sum_windows

torch.fx.wrap("prepare_guide")
torch.fx.wrap("sum_windows")

# the neighbourhoods of UPLiFT by their number of pixels: radius, and which offsets (down, right) of that radius belong to them
NEIGHBOURHOODS: dict[int, tuple[int, Callable[[int, int], bool]]] = {
    5: (1, lambda i, j: abs(i) + abs(j) <= 1),
    9: (1, lambda i, j: True),
    13: (2, lambda i, j: abs(i) + abs(j) <= 2),
    17: (2, lambda i, j: i == 0 or j == 0 or abs(i) == abs(j)),
    25: (2, lambda i, j: True),
}


class LocalAttender(Guided):
    """Local attender of UPLiFT (Walmer et al., 2026): the guide attends to the neighbours of its source pixel, without queries or keys.

    A 1x1 convolution of the guide, plus the guide itself, gives the logits of D source pixels around each output pixel; a softmax turns
    them into weights. Guide channels beyond D are not added, and missing ones count as 0. Outside the map, the nearest pixel is read.
    D (C_guide + 1) parameters, 1,285 for C_guide = 256 and D = 5; D C_guide + K^2 C multiply-adds per output pixel for a window of K x K.
    State-dict keys are those of the authors' code (github.com/mwalmer-umd/UPLiFT, MIT licence), in which it is the last layer of a network
    that computes the guide from an image.

    Args:
        channels: C, the channels of x.
        guide_channels: C_guide, the channels of the guide; None means C.
        neighbours: D, the number of source pixels. 5 and 13 are those at most 1 and 2 steps away, 9 and 25 those of a 3x3 and a 5x5 window,
            and 17 those of a 5x5 window that lie straight or diagonally from its centre.
        residual: whether the guide is added to the logits.

    Raises:
        ValueError: `neighbours` is none of these numbers.
    """

    def __init__(self, channels: int, guide_channels: int | None = None, neighbours: int = 5, residual: bool = True):
        super().__init__(channels, guide_channels)
        if neighbours not in NEIGHBOURHOODS:
            raise ValueError(f"neighbours must be one of {', '.join(map(str, NEIGHBOURHOODS))}, got {neighbours!r}")
        self.residual = residual
        self.conv1 = nn.Conv2d(self.guide_channels, neighbours, 1)
        radius, belongs = NEIGHBOURHOODS[neighbours]
        self.kernel_size = 2 * radius + 1
        offsets = [(i, j) for i in range(-radius, radius + 1) for j in range(-radius, radius + 1)]
        taps = [offset for offset in offsets if belongs(*offset)]
        # the channel of each tap of the window; that behind the last belongs to the taps that are not neighbours, with weight 0
        channels_of_taps = torch.tensor([taps.index(offset) if offset in taps else neighbours for offset in offsets])
        self.register_buffer("channels_of_taps", channels_of_taps, persistent=False)

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Upsample x [N, C, H, W] under guide [N, guide_channels, h, w] to [N, C, h, w]."""
        guide = prepare_guide(x, guide, self.guide_channels)
        logits = self.conv1(guide)  # [N, D, h, w]
        if self.residual:
            missing = max(0, self.conv1.out_channels - self.guide_channels)
            logits = logits + F.pad(guide[:, : self.conv1.out_channels], (0, 0, 0, 0, 0, missing))
        weights = F.pad(logits.softmax(1), (0, 0, 0, 0, 0, 1)).index_select(1, self.get_buffer("channels_of_taps"))
        return sum_windows(x, weights, self.kernel_size, border="replicate")
