"""ResNet with a slot for its seven downsamplers (paper, section 4.1 and Figure 4).

Layers that torchvision's ResNet also has keep its state-dict keys, so that published ImageNet weights load.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch.fx
import torch.nn as nn
from torch import Tensor

from .deform import DeformConv
from .samplers import Sampler, halve, make_sampler
from .slot_checks import check_features
from .weights import load_weights

torch.fx.wrap("check_features")

Norm = Callable[[int], nn.Module]


def _make_conv(inputs: int, outputs: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2 * dilation, dilation=dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _make_pair(sampler: Sampler, inputs: int, width: int) -> nn.Module | None:
    """Make the module that downsamples both paths of a block, if the sampler has one."""
    # a partial hides its class in .func
    pair = getattr(getattr(sampler, "func", sampler), "make_pair", None)
    return pair(inputs, width, **getattr(sampler, "keywords", {})) if pair else None


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut; the 3x3 and the shortcut downsample (torchvision's "v1.5" block).

    Args:
        inputs: channels of the input.
        width: channels of the 3x3 convolution; the output has 4 times as many.
        stride: factor of the downsampling.
        sampler: None means strided convolutions. With a sampler, the convolutions have stride 1, and a sampler before the 3x3 and another
            before the 1x1 of the shortcut downsample instead. A sampler with a function `make_pair` downsamples both paths with one module,
            which also sees the input of the block, and a 1x1 convolution replaces the 3x3 (LIP with a bottleneck).
        norm_layer: takes a number of channels and returns the normalisation layer.
        deformable: whether the 3x3 is a DCNv2, except where a sampler precedes it (paper, section 5.2).
        dilation: dilation of the 3x3.
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
        self.pair_sampler = _make_pair(sampler, inputs, width) if sampler and stride > 1 else None
        samples = sampler if sampler and stride > 1 and self.pair_sampler is None else None
        conv_stride = 1 if sampler else stride
        deforms = deformable and not (sampler and stride > 1)
        size = 1 if self.pair_sampler is not None else 3
        self.conv1 = _make_conv(inputs, width, 1)
        self.bn1 = norm_layer(width)
        self.sampler = make_sampler(samples, width, width) if samples else nn.Identity()
        self.conv2 = DeformConv(width, width, conv_stride, dilation) if deforms else _make_conv(width, width, size, conv_stride, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _make_conv(width, outputs, 1)
        self.bn3 = norm_layer(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut_sampler = make_sampler(samples, inputs, inputs) if samples else nn.Identity()
        self.downsample = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(_make_conv(inputs, outputs, 1, conv_stride), norm_layer(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Compute [N, width * 4, ceil(H / stride), ceil(W / stride)] from x [N, inputs, H, W]."""
        y = self.relu(self.bn1(self.conv1(x)))
        if self.pair_sampler is not None:
            x, y = self.pair_sampler(x, y)
        elif not isinstance(self.sampler, nn.Identity):
            x, y = halve(x, self.shortcut_sampler), halve(y, self.sampler)
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """Residual network of bottleneck blocks: a backbone that returns four levels of features, or a classifier.

    Args:
        depths: number of blocks of layer1 to layer4.
        width: channels of the stem and of the 3x3 convolutions of layer1; doubles with every layer.
        downsample: None means the published network, with the stride in the 3x3 and in the 1x1 of the shortcut, and a 3x3 max-pool in the
            stem. A sampler has seven places: it replaces the max-pool, and it precedes the 3x3 and the 1x1 of the shortcut in the first
            blocks of layer2, layer3 and layer4. The sizes of the maps stay the same.
        deep_stem: whether three 3x3 convolutions replace the 7x7 of the stem, with the names that UperNet's authors gave them. Section 4.1
            of the paper says "one 3x3 convolution layer", which neither ResNet [13] nor the official UperNet has.
        num_classes: None gives a backbone; a number adds global average pooling and the classifier `fc`.
        norm_layer: takes a number of channels and returns the normalisation layer.
        zero_init_residual: whether every block starts as the identity, because the scale of its last norm starts at 0.
        output_stride: 32 gives the published network. 16 removes the stride (and the samplers) of layer4 and dilates its 3x3 convolutions
            by 2. 8 removes those of layer3 and layer4, with dilations 2 and 4, as in the backbone of PSPNet and PSANet.
        deformable: the layers, of 1 to 4, whose 3x3 convolutions are DCNv2. The paper's "Res-2, Res-3, Res-4" are taken as (2, 3, 4), the
            stages c3 to c5 of the cited DCNv2; by the count of section 4.1, they are (1, 2, 3).
        weights: a file to start from, see `carafepp.models.weights`.

    Attributes:
        out_channels: channels of C2 to C5.
        pretrained: whether `weights` were given.
        untrained: names of the tensors that start at random, all without `weights`.

    Raises:
        ValueError: `output_stride` is not 8, 16 or 32, or `deformable` names a layer that does not exist.
        FileNotFoundError, ValueError: `weights` cannot be read, or does not fit the network.
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
        if not isinstance(deformable, Sequence) or not {*deformable} <= {*range(1, len(depths) + 1)}:
            raise ValueError(f"deformable must be a list of layers, of 1 to {len(depths)}, got {deformable}")
        self.deep_stem = deep_stem
        if deep_stem:
            channels = 2 * width
            self.conv1, self.bn1 = _make_conv(3, width, 3, stride=2), norm_layer(width)
            self.conv2, self.bn2 = _make_conv(width, width, 3), norm_layer(width)
            self.conv3, self.bn3 = _make_conv(width, channels, 3), norm_layer(channels)
        else:
            channels = width
            self.conv1, self.bn1 = _make_conv(3, width, 7, stride=2), norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = make_sampler(downsample, channels, channels) if downsample else nn.MaxPool2d(3, stride=2, padding=1)

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
        self.untrained = [*self.state_dict()] if weights is None else load_weights(self, weights).initialised

    def apply_stem(self, x: Tensor) -> Tensor:
        """Compute [N, width, ceil(H / 4), ceil(W / 4)] from images x [N, 3, H, W]; a deep stem gives 2 * width channels."""
        x = self.relu(self.bn1(self.conv1(x)))
        if self.deep_stem:
            x = self.relu(self.bn2(self.conv2(x)))
            x = self.relu(self.bn3(self.conv3(x)))
        return halve(x, self.maxpool)

    def extract_features(self, x: Tensor) -> list[Tensor]:
        """Compute C2 to C5 of images x [N, 3, H, W].

        Level i is [N, out_channels[i], ceil(H / s), ceil(W / s)] with s = min(2**(i + 2), output_stride).

        Raises:
            TypeError, ValueError: x is not a tensor of images.
        """
        x = self.apply_stem(check_features(x, getattr(self.conv1, "in_channels", None)))
        levels = []
        for i in range(len(self.out_channels)):
            x = getattr(self, f"layer{i + 1}")(x)
            levels.append(x)
        return levels

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        """Compute C2 to C5 (see `extract_features`), or with a classifier logits [N, num_classes], of images x [N, 3, H, W]."""
        levels = self.extract_features(x)
        return levels if self.fc is None else self.fc(self.avgpool(levels[-1]).flatten(1))


def resnet50(**options: Any) -> ResNet:
    """Build ResNet-50, with 25.6 M parameters for 1000 classes; `options` are those of `ResNet`."""
    return ResNet((3, 4, 6, 3), **options)


def resnet101(**options: Any) -> ResNet:
    """Build ResNet-101, with 44.5 M parameters for 1000 classes; `options` are those of `ResNet`."""
    return ResNet((3, 4, 23, 3), **options)


def tiny(**options: Any) -> ResNet:
    """Build a ResNet of a quarter of the width and one block per layer, for CPUs: 0.5 M parameters."""
    return ResNet((1, 1, 1, 1), width=16, **options)
