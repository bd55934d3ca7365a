"""PSANet (Zhao et al., 2018), one of the networks that Table VIII compares.

State-dict keys of the decoder are those of the authors' public PyTorch implementation.
"""

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .decoding import Backbone, make_classifier, make_conv_bn_relu, stretch


@torch.fx.wrap
def align_masks(masks: Tensor) -> Tensor:
    """Rearrange masks over relative positions into scores of absolute positions.

    Args:
        masks: [N, M * M, H, W] with M = 2 r + 1. Channel (dy + r) * M + (dx + r) at position i is the score of position i + (dy, dx).

    Returns:
        Scores [N, H * W, H * W] of position j (axis 1) for position i (axis 2); -inf where j is further than r from i.
    """
    n, channels, h, w = masks.shape
    side = round(channels**0.5)
    # padded to the offsets between positions of the map: -(h - 1)..h - 1 and -(w - 1)..w - 1
    rows, columns = h - 1 - side // 2, w - 1 - side // 2
    masks = F.pad(masks.view(n, side, side, h * w), (0, 0, columns, columns, rows, rows), value=float("-inf"))
    y, x = torch.arange(h, device=masks.device), torch.arange(w, device=masks.device)
    down, right = (y[:, None] - y + h - 1) * (2 * w - 1), x[:, None] - x + w - 1
    offset = (down[:, None, :, None] + right[:, None]).view(h * w, h * w)  # [j, i]
    return masks.flatten(1, 2).gather(1, offset.expand(n, h * w, h * w))


class PointwiseAttention(nn.Module):
    """Attention in which every position collects from the others and distributes to them, with weights predicted per relative position.

    Args:
        channels: channels of the map.
        dim: channels of the features that are collected and distributed.
        mask_size: side, in positions, of the window for which weights are predicted; odd. Weights outside the window are 0.
        shrink: factor by which the map is reduced before the attention.

    Raises:
        ValueError: `mask_size` is even.
    """

    def __init__(self, channels: int, dim: int, *, mask_size: int, shrink: int):
        super().__init__()
        if mask_size % 2 == 0:
            raise ValueError(f"mask_size must be odd, so that a window has a middle, got {mask_size}")
        self.shrink = shrink
        # reduce and attention collect, reduce_p and attention_p distribute
        self.reduce, self.reduce_p = (make_conv_bn_relu(channels, dim, 1) for _ in range(2))
        self.attention, self.attention_p = (
            nn.Sequential(*make_conv_bn_relu(dim, dim, 1), nn.Conv2d(dim, mask_size**2, 1, bias=False)) for _ in range(2)
        )
        self.proj = make_conv_bn_relu(2 * dim, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [N, 2 * channels, H, W] from x [N, channels, H, W]: x itself, then what its positions collected and received."""
        size = x.shape[2:]
        # rounded up without a division of a negative number, which ONNX rounds towards zero
        small = [(size[0] + self.shrink - 1) // self.shrink, (size[1] + self.shrink - 1) // self.shrink]
        collected, distributed = (stretch(reduce(x), small) for reduce in (self.reduce, self.reduce_p))
        wanted = align_masks(self.attention(collected))
        # the weights with which j distributes to i are in the mask of j
        offered = align_masks(self.attention_p(distributed)).transpose(1, 2)
        sums = [
            (values.flatten(2) @ scores.softmax(1)).unflatten(2, small) for values, scores in ((collected, wanted), (distributed, offered))
        ]
        return torch.cat([x, stretch(self.proj(torch.cat(sums, dim=1)), size)], dim=1)


class PSANet(nn.Module):
    """Semantic segmentation with bi-directional point-wise spatial attention on the last map of a dilated backbone.

    Args:
        backbone: maps an image [N, 3, H, W] to features C2 to C5; `out_channels` lists their channels. In the published network, C4 and C5
            have stride 8.
        num_classes: number of classes.
        dim: channels of the attention and of the last map.
        mask_size: side of the window of attention around a position, in positions of the shrunk C5; 59 is for crops of 465 pixels.
        shrink: factor by which C5 is reduced before the attention.
    """

    def __init__(self, backbone: Backbone, num_classes: int, *, dim: int = 512, mask_size: int = 59, shrink: int = 2):
        super().__init__()
        *_, middle, top = backbone.out_channels
        self.backbone = backbone
        self.psa = PointwiseAttention(top, dim, mask_size=mask_size, shrink=shrink)
        self.cls = make_classifier(2 * top, dim, num_classes)
        self.aux = make_classifier(middle, dim // 2, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Predict logits [N, num_classes, h, w] at the size of C5 for images x [N, 3, H, W]; in training also auxiliary logits from C4."""
        *_, c4, c5 = self.backbone(x)
        logits = self.cls(self.psa(c5))
        return (logits, self.aux(c4)) if self.training else logits
