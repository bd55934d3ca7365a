"""PSANet, a network that the paper compares with (Table VIII; Zhao et al., 2018).

State-dict keys of the decoder are those of the authors' public PyTorch implementation.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .decoding import Backbone, classifier, conv_bn_relu, stretch


def align_masks(masks: Tensor) -> Tensor:
    """Lay masks of *relative* positions out over the map's positions.

    Channel (dy + r) * M + (dx + r) of `masks` [N, M * M, H, W], M = 2 r + 1, at position i is the score of position i + (dy, dx).

    Returns:
        Scores [N, H * W, H * W] of position j (axis 1) for position i (axis 2); -inf where j is further than r from i.
    """
    n, channels, h, w = masks.shape
    side = round(channels**0.5)
    # so that the offsets are those between positions of the map: -(h - 1)..h - 1 and -(w - 1)..w - 1
    rows, columns = h - 1 - side // 2, w - 1 - side // 2
    masks = F.pad(masks.view(n, side, side, h * w), (0, 0, columns, columns, rows, rows), value=float("-inf"))
    y = torch.arange(h, device=masks.device).repeat_interleave(w)
    x = torch.arange(w, device=masks.device).repeat(h)
    offset = (y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1  # [j, i]
    return masks.flatten(1, 2).gather(1, offset.expand(n, -1, -1))


class PointwiseAttention(nn.Module):
    """Every position collects from all others, and all others distribute to it, with weights that depend on where they lie.

    Args:
        channels: of the map.
        dim: channels of what is collected and distributed.
        mask_size: odd; weights are predicted for a window of so many positions a side, and are 0 beyond it.
        shrink: the attention works on a map that is smaller by so much.

    Raises:
        ValueError: `mask_size` is even.
    """

    def __init__(self, channels: int, dim: int, *, mask_size: int, shrink: int):
        super().__init__()
        if mask_size % 2 == 0:
            raise ValueError(f"mask_size must be odd, so that a window has a middle, got {mask_size}")
        self.shrink = shrink
        # collect; _p: distribute
        self.reduce, self.reduce_p = (conv_bn_relu(channels, dim, 1) for _ in range(2))
        self.attention, self.attention_p = (
            nn.Sequential(*conv_bn_relu(dim, dim, 1), nn.Conv2d(dim, mask_size**2, 1, bias=False)) for _ in range(2)
        )
        self.proj = conv_bn_relu(2 * dim, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, 2 * channels, H, W]: the map and what its positions collected and were given."""
        size = x.shape[2:]
        small = [-(-side // self.shrink) for side in size]
        collected, distributed = (stretch(reduce(x), small) for reduce in (self.reduce, self.reduce_p))
        wanted = align_masks(self.attention(collected))
        # what j has for i is in the mask of j
        offered = align_masks(self.attention_p(distributed)).transpose(1, 2)
        sums = [
            (values.flatten(2) @ scores.softmax(1)).unflatten(2, small) for values, scores in ((collected, wanted), (distributed, offered))
        ]
        return torch.cat([x, stretch(self.proj(torch.cat(sums, dim=1)), size)], dim=1)


class PSANet(nn.Module):
    """Semantic segmentation with bi-directional point-wise spatial attention on a dilated backbone's last map.

    Args:
        backbone: image [N, 3, H, W] -> features C2 to C5; `out_channels` lists their channels. Published with C4 and C5 at stride 8.
        num_classes: classes.
        dim: channels of the attention and of the last map.
        mask_size: positions a side that the attention of one of C5's (shrunk) positions reaches; 59 is that of crops of 465 pixels.
        shrink: the attention works on a map that is smaller than C5 by so much.
    """

    def __init__(self, backbone: Backbone, num_classes: int, *, dim: int = 512, mask_size: int = 59, shrink: int = 2):
        super().__init__()
        *_, middle, top = backbone.out_channels
        self.backbone = backbone
        self.psa = PointwiseAttention(top, dim, mask_size=mask_size, shrink=shrink)
        self.cls = classifier(2 * top, dim, num_classes)
        self.aux = classifier(middle, dim // 2, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Image [N, 3, H, W] -> logits [N, num_classes, h, w] of C5's size; in training also the auxiliary logits, of C4."""
        *_, c4, c5 = self.backbone(x)
        logits = self.cls(self.psa(c5))
        return (logits, self.aux(c4)) if self.training else logits
