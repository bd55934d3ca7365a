"""The generator of Global&Local with a slot for its downsamplers and one for its upsamplers (paper, section 4.3; Iizuka et al., 2017)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.fx
import torch.nn as nn
from torch import Tensor

from .samplers import Sampler, check_fit, fit, make_sampler
from .slot_checks import check_features

torch.fx.wrap("check_features")
torch.fx.wrap("check_fit")
torch.fx.wrap("fit")

Norm = Callable[[int], nn.Module]


class Layer(NamedTuple):
    """One convolution of the generator.

    Attributes:
        channels: channels of the output, as a multiple of the width.
        kernel_size: side of the kernel.
        dilation: dilation of the convolution.
        resize: "down" or "up" by 2, or "" for none.
    """

    channels: float
    kernel_size: int = 3
    dilation: int = 1
    resize: str = ""


LAYERS = (
    *(Layer(1, kernel_size=5), Layer(2, resize="down"), Layer(2), Layer(4, resize="down"), Layer(4), Layer(4)),
    *(Layer(4, dilation=dilation) for dilation in (2, 4, 8, 16)),
    *(Layer(4), Layer(4), Layer(2, resize="up"), Layer(2), Layer(1, resize="up"), Layer(0.5)),
)


def make_stage(layer: Layer, inputs: int, outputs: int, sampler: Sampler | None, norm_layer: Norm) -> nn.Sequential:
    """Build a layer: convolution, normalisation, ReLU.

    Where the layer resizes, a sampler precedes a convolution of stride 1; without a sampler, the convolution is strided.
    """
    padding = layer.dilation * (layer.kernel_size // 2)
    if layer.resize and sampler:
        convolution = [make_sampler(sampler, inputs, inputs), nn.Conv2d(inputs, outputs, layer.kernel_size, padding=padding, bias=False)]
    elif layer.resize == "up":
        convolution = [nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)]
    else:
        stride = 2 if layer.resize else 1
        convolution = [nn.Conv2d(inputs, outputs, layer.kernel_size, stride, padding, layer.dilation, bias=False)]
    return nn.Sequential(*convolution, norm_layer(outputs), nn.ReLU(inplace=True))


class GlobalLocal(nn.Module):
    """Generator that fills the hole of an image: an encoder of stride 4, four dilated convolutions and a decoder; 6.1 M parameters.

    Args:
        width: channels of the first layer; the middle has 4 times as many.
        downsample: None means the published network (two 3x3 convolutions of stride 2). A sampler, with width and 2 * width channels,
            replaces each stride, and the convolution after it has stride 1.
        upsample: None means the published network (two 4x4 deconvolutions). A sampler, with 4 * width and 2 * width channels, replaces each
            deconvolution, and a 3x3 convolution after it changes the number of channels to that of the next layer.
        norm_layer: takes a number of channels and returns the normalisation layer.
    """

    def __init__(
        self, width: int = 64, *, downsample: Sampler | None = None, upsample: Sampler | None = None, norm_layer: Norm = nn.BatchNorm2d
    ):
        super().__init__()
        samplers = {"down": downsample, "up": upsample, "": None}
        channels = [4, *(int(layer.channels * width) for layer in LAYERS)]
        self.stages = nn.ModuleList(
            make_stage(layer, inputs, outputs, samplers[layer.resize], norm_layer)
            for layer, inputs, outputs in zip(LAYERS, channels, channels[1:], strict=False)
        )
        self.output = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Complete images [N, 3, H, W] in [-1, 1] whose holes are given by masks [N, 1, H, W], 1 in the hole and 0 elsewhere.

        The content of the hole is ignored. H and W are at least 1.

        Returns:
            Images [N, 3, H, W] in [-1, 1]. The network also predicts the known pixels.

        Raises:
            TypeError, ValueError: the images or the masks have another type or shape, or the upsamplers do not undo the ratio of the
                downsamplers.
        """
        images, masks = check_features(images, 3, "images"), check_features(masks, 1, "masks")
        y = torch.cat([images * (1 - masks), masks], dim=1)
        sizes = []
        for layer, layers in zip(LAYERS, self.stages, strict=True):
            if layer.resize == "down":
                sizes.append(y.shape[2:])
            x, y = y, layers(y)
            if layer.resize == "up":
                y = fit(y, check_fit(x.shape[2:], y.shape[2:], sizes.pop(), "upsample"))
        return self.output(y).clamp(-1, 1)
