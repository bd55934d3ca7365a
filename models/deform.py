"""Modulated deformable convolution (DCNv2, Zhu et al., 2019), used in the stronger backbone of Table I."""

from typing import Any, cast

import torch
import torch.fx
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula
from torchvision.ops import deform_conv2d

# torch.fx cannot follow the checks of sizes inside
torch.fx.wrap("deform_conv2d_in_float32")


def deform_conv2d_in_float32(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor, **geometry: Any) -> Tensor:
    """Compute torchvision's `deform_conv2d` of half precision in float32 on a CPU, as torchvision does under autocast on a GPU."""
    if x.device.type != "cpu" or {t.dtype for t in (x, offset, weight, mask)} <= {torch.float32, torch.float64}:
        return deform_conv2d(x, offset, weight, mask=mask, **geometry)
    with torch.autocast("cpu", enabled=False):
        return deform_conv2d(x.float(), offset.float(), weight.float(), mask=mask.float(), **geometry).to(x.dtype)


class DeformConv(nn.Conv2d):
    """3x3 convolution that samples each of its nine points at a predicted offset and weights it by a predicted mask in 0..1.

    State-dict keys and initialisation are those of mmcv's ModulatedDeformConv2dPack. `conv_offset` starts at 0, so that the layer starts
    as the plain convolution with half its weights. Weights of the plain convolution load.

    Args:
        inputs, outputs: channels of the input and of the output.
        stride: stride of the convolution.
        dilation: dilation of the convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1):
        super().__init__(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.conv_offset = nn.Conv2d(inputs, 27, 3, stride, padding=dilation, dilation=dilation)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [N, inputs, H, W] to [N, outputs, ceil(H / stride), ceil(W / stride)]."""
        offset, mask = self.conv_offset(x).split([18, 9], dim=1)
        stride, padding, dilation = (cast(tuple[int, int], pair) for pair in (self.stride, self.padding, self.dilation))
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        return deform_conv2d_in_float32(x, offset, self.weight, mask.sigmoid(), **geometry)


@register_flop_formula(torch.ops.torchvision.deform_conv2d)
def _deform_conv_flops(x_shape: torch.Size, weight_shape: torch.Size, *args: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    # as for the plain convolution: the bilinear sampling grows only with the inputs and is small in comparison
    return conv_flop_count(list(x_shape), list(weight_shape), list(out_shape))
