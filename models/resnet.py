"""ResNet with a slot for its seven downsamplers (paper, sections 4.1 and Figure 4).

State-dict keys are torchvision's where the layers are, so that published ImageNet weights load.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch.nn as nn
from torch import Tensor

from .deform import DeformConv
from .samplers import Sampler
from .weights import load_weights

Norm = Callable[[int], nn.Module]


def _conv(inputs: int, outputs: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2 * dilation, dilation=dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut; the 3x3 and the shortcut downsample by `stride` (torchvision's "v1.5" block).

    With a `sampler` the convolutions have stride 1, and one sampler before the 3x3 and one before the shortcut's 1x1 do it.
    `deformable` makes the 3x3 a DCNv2, unless a sampler stands before it (paper, section 5.2). `dilation` is that of the 3x3.
    """

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        sampler: Sampler | None,
        norm_layer: Norm,
        deformable: bool = False,
        dilation: int = 1,
    ):
        super().__init__()
        outputs = width * self.expansion
        resample = sampler if sampler and stride > 1 else lambda channels: nn.Identity()
        conv_stride = 1 if sampler else stride
        deforms = deformable and not (sampler and stride > 1)
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = norm_layer(width)
        self.sampler = resample(width)
        self.conv2 = DeformConv(width, width, conv_stride, dilation) if deforms else _conv(width, width, 3, conv_stride, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = norm_layer(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut_sampler = resample(inputs)
        self.downsample = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, conv_stride), norm_layer(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, width * 4, ceil(H / stride), ceil(W / stride)]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(self.sampler(y))))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.downsample(self.shortcut_sampler(x)))


class ResNet(nn.Module):
    """Residual network of bottlenecks: a pyramid of features, or a classifier.

    Args:
        depths: blocks of layer1 to layer4.
        width: channels of the stem and of layer1's 3x3 convolutions; doubles with every layer.
        downsample: None is the published network (stride in the 3x3 and in the 1x1 of the shortcut, 3x3 max-pool in the stem). A sampler
            stands in seven places instead: for the stem's max-pool, and before the 3x3 and before the shortcut's 1x1 in the first block
            of layer2, layer3 and layer4; sizes are the same.
        deep_stem: three 3x3 convolutions instead of one 7x7, with the names that they have in the UperNet authors' backbones.
        num_classes: None makes a backbone; a number adds global average pooling and the classifier `fc`.
        norm_layer: channels in, normalisation out.
        zero_init_residual: start every block as the identity (the last scale of its main path is 0).
        output_stride: 32 is the published network. 16 or 8 leave out the stride (and the samplers) of layer4, or of layer3 and layer4,
            whose 3x3 convolutions are dilated by 2, or by 2 and 4, instead: the backbone of PSPNet and PSANet.
        deformable: the layers, of 1 to 4, whose 3x3 convolutions are DCNv2. The paper's "Res-2, Res-3, Res-4" are taken as (2, 3, 4), the
            stages c3 to c5 that the public DCNv2 backbones deform.
        weights: a file to start from, see `carafepp.models.weights`.

    Raises:
        ValueError: `output_stride` is none of 8, 16 and 32.
        FileNotFoundError, ValueError: `weights` cannot be read, or is of another network.

    `out_channels` lists the channels of C2 to C5, `pretrained` says whether there were `weights`.
    """

    def __init__(
        self,
        depths: Sequence[int],
        width: int = 64,
        *,
        downsample: Sampler | None = None,
        deep_stem: bool = False,
        num_classes: int | None = None,
        norm_layer: Norm = nn.BatchNorm2d,
        zero_init_residual: bool = False,
        output_stride: int = 32,
        deformable: Sequence[int] = (),
        weights: str | Path | None = None,
    ):
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        self.deep_stem = deep_stem
        if deep_stem:
            channels = 2 * width
            self.conv1, self.bn1 = _conv(3, width, 3, stride=2), norm_layer(width)
            self.conv2, self.bn2 = _conv(width, width, 3), norm_layer(width)
            self.conv3, self.bn3 = _conv(width, channels, 3), norm_layer(channels)
        else:
            channels = width
            self.conv1, self.bn1 = _conv(3, width, 7, stride=2), norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = downsample(channels) if downsample else nn.MaxPool2d(3, stride=2, padding=1)

        self.out_channels = [width * 2**i * Bottleneck.expansion for i in range(len(depths))]
        for i, (depth, outputs) in enumerate(zip(depths, self.out_channels, strict=True)):
            inputs = [channels, *[outputs] * (depth - 1)]
            # without dilation the layer would end at stride 4 * 2**i
            dilation = max(1, 4 * 2**i // output_stride)
            strides = [1 if i == 0 or dilation > 1 else 2, *[1] * (depth - 1)]
            blocks = (
                Bottleneck(c, width * 2**i, stride, downsample, norm_layer, i + 1 in deformable, dilation)
                for c, stride in zip(inputs, strides, strict=True)
            )
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            channels = outputs

        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = None
        if num_classes:
            self.fc = nn.Linear(channels, num_classes)
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(cast(Tensor, module.bn3.weight))
        self.pretrained = weights is not None
        if weights is not None:
            load_weights(self, weights)

    def stem(self, x: Tensor) -> Tensor:
        """Image [N, 3, H, W] -> [N, width (2 * width if deep), ceil(H / 4), ceil(W / 4)]."""
        x = self.relu(self.bn1(self.conv1(x)))
        if self.deep_stem:
            x = self.relu(self.bn2(self.conv2(x)))
            x = self.relu(self.bn3(self.conv3(x)))
        return self.maxpool(x)

    def features(self, x: Tensor) -> list[Tensor]:
        """Image [N, 3, H, W] -> C2 to C5, [N, out_channels[i], ceil(H / s), ceil(W / s)] for s = min(2**(i + 2), output_stride)."""
        x = self.stem(x)
        levels = []
        for i in range(len(self.out_channels)):
            x = getattr(self, f"layer{i + 1}")(x)
            levels.append(x)
        return levels

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        """Image [N, 3, H, W] -> C2 to C5 (see `features`), or logits [N, num_classes] with a classifier."""
        levels = self.features(x)
        return levels if self.fc is None else self.fc(self.avgpool(levels[-1]).flatten(1))


def resnet50(**options: Any) -> ResNet:
    """ResNet-50: 25.6 M parameters with 1000 classes."""
    return ResNet((3, 4, 6, 3), **options)


def resnet101(**options: Any) -> ResNet:
    """ResNet-101: 44.5 M parameters with 1000 classes."""
    return ResNet((3, 4, 23, 3), **options)


def tiny(**options: Any) -> ResNet:
    """A quarter of ResNet's width and one block a layer, for CPUs: 0.5 M parameters."""
    return ResNet((1, 1, 1, 1), width=16, **options)
