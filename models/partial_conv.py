"""Partial convolution: convolve the known pixels, renormalise, and update the map of known pixels (Liu et al., 2018; paper, section 4.3).

Every layer takes the features and a map `known` [N, 1, H, W] of the same dtype, and returns both. `known` is 1 where a feature depends on
at least one known pixel, and 0 in the hole.
"""

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reassemble
from .carafe import CARAFE
from .global_local import LAYERS, Layer, Norm
from .samplers import AvgPool, Bilinear, Nearest, Sampler, check_fit, fit
from .slot_checks import check_features

torch.fx.wrap("check_features")
torch.fx.wrap("check_fit")
torch.fx.wrap("fit")

# linear samplers with fixed weights: sampling `known` gives the known share of every target
LINEAR = (Nearest, Bilinear, AvgPool)


class PartialConv2d(nn.Conv2d):
    """Convolution over the known part of each window, scaled by window size / known pixels; the bias is added unscaled.

    A target becomes known if its window contains a known pixel; other targets are 0. As in the official module, padding is unknown.
    """

    def forward(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features [N, out_channels, Ho, Wo] and known [N, 1, Ho, Wo] from x [N, in_channels, H, W] and known [N, 1, H, W]."""
        ones = known.new_ones(1, 1, *self.kernel_size)
        with torch.no_grad():
            count = F.conv2d(known, ones, None, self.stride, self.padding, self.dilation).float()
            ratio = (ones.numel() / count).masked_fill(count == 0, 0)
        y = F.conv2d(x * known, self.weight, None, self.stride, self.padding, self.dilation)
        known = (count > 0).to(y.dtype)
        y = y * ratio.to(y.dtype)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)[:, None, None] * known
        return y, known


class PartialSampler(nn.Module):
    """A sampler that also propagates the mask.

    CARAFE++ predicts its kernels w from the known features, with 0 in the hole. It reassembles the features x, the mask m (1 where known)
    and a map of ones with the same kernels. Let S(v) be the sum of w_i v_i over the window, where v is 0 outside the map. Then

        y = S(x m) / S(m) * S(1),   m' = 1   where S(m) > 0
        y = 0,                      m' = 0   elsewhere

    S(1) is 1 except at borders. There it is less, because the window of plain CARAFE++ also covers the zeros outside the map. An all-ones
    mask therefore gives plain CARAFE++, a constant image gives the same output as without a hole at known targets, and a target whose whole
    window lies in the hole stays in the hole.

    In exact arithmetic, softmax weights are positive. Therefore m' is 1 where the window contains a known pixel, and S(x m) / S(m) is the
    sum weighted by the softmax over the known taps only. Both are computed in this form, so that small weights of known pixels cannot
    underflow in half precision.

    The outputs of Nearest, Bilinear and AvgPool are divided by the sampled mask in the same way.

    Args:
        sampler: a CARAFE, Nearest, Bilinear or AvgPool module.

    Raises:
        TypeError: the sampler is of another type.
        ValueError: the weights of a CARAFE do not sum to 1, its scale is rational, or its windows read pixels of the map outside it.
    """

    def __init__(self, sampler: nn.Module):
        super().__init__()
        if isinstance(sampler, CARAFE):
            spec = sampler.spec
            if spec.normalizer not in ("softmax", "sigmoid_normalized"):
                raise ValueError(f"normalizer must be softmax or sigmoid_normalized in a partial convolution, got {spec.normalizer!r}")
            if spec.border not in ("zero", "renormalize"):
                raise ValueError(f"border must be zero or renormalize in a partial convolution, got {spec.border!r}")
            if spec.up > 1 and spec.down > 1:
                raise ValueError(f"up or down must be 1 in a partial convolution, got up={spec.up}, down={spec.down}")
        elif not isinstance(sampler, LINEAR):
            names = ", ".join(kind.__name__ for kind in (CARAFE, *LINEAR))
            raise TypeError(f"a partial convolution propagates masks through {names}, got {type(sampler).__name__}")
        self.sampler = sampler

    def forward(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features [N, C, Ho, Wo] and known [N, 1, Ho, Wo] from features x [N, C, H, W] and known [N, 1, H, W]."""
        x = x * known
        if isinstance(self.sampler, CARAFE):
            return _reassemble_known(self.sampler, x, known)
        share = self.sampler(known).float()
        y = self.sampler(x)
        return y * (1 / share).masked_fill(share == 0, 0).to(y.dtype), (share > 0).to(y.dtype)


# torch.fx cannot compute a number from a dtype
@torch.fx.wrap
def _exclude(logits: Tensor, unknown: Tensor) -> Tensor:
    """Replace the logits of unknown taps by a number so low that their weights are 0 beside those of known taps."""
    # a finite number: a window without a known tap then sums zeros, where -inf would give NaN
    return logits.masked_fill(unknown, torch.finfo(logits.dtype).min / 2)


def _reassemble_known(sampler: CARAFE, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    spec, logits = sampler.spec, sampler.logits(x)
    size, margin = spec.kernel_size, spec.kernel_size // 2
    taps = F.unfold(known, size, padding=margin, stride=spec.down)  # [N, K * K, Hq * Wq]
    taps = taps.unflatten(2, logits.shape[2:])[:, None, :, None]  # [N, 1, K * K, 1, Hq, Wq]
    cells = logits.unflatten(1, (spec.groups, spec.taps, spec.up**2))
    y = reassemble(x, _exclude(cells, taps == 0).flatten(1, 3), **spec._asdict())
    ones = torch.ones_like(x[:, : spec.groups], memory_format=torch.contiguous_format)
    inside = reassemble(ones, logits, **spec._asdict())
    y = (y.unflatten(1, (spec.groups, -1)) * inside[:, :, None]).flatten(1, 2)
    known = F.max_pool2d(known, size, spec.down, margin)
    return y, F.interpolate(known, scale_factor=spec.up, mode="nearest").to(y.dtype)


class PartialStage(nn.Module):
    """Partial convolution, normalisation, ReLU; where the layer resizes, a sampler precedes them, or the convolution is strided."""

    def __init__(self, layer: Layer, inputs: int, outputs: int, sampler: Sampler | None, norm_layer: Norm):
        super().__init__()
        stride = 2 if layer.resize == "down" and not sampler else 1
        padding = layer.dilation * (layer.kernel_size // 2)
        self.sampler = PartialSampler(sampler(inputs)) if sampler else None
        self.conv = PartialConv2d(inputs, outputs, layer.kernel_size, stride, padding, layer.dilation, bias=False)
        self.norm = norm_layer(outputs)

    def forward(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features [N, outputs, Ho, Wo] and known [N, 1, Ho, Wo] from features x [N, inputs, H, W] and known [N, 1, H, W]."""
        if self.sampler is not None:
            x, known = self.sampler(x, known)
        x, known = self.conv(x, known)
        return F.relu(self.norm(x), inplace=True), known


class PartialGlobalLocal(nn.Module):
    """Global&Local's generator with partial convolutions only ("we substitute the convolution layers", paper, section 5.1).

    Args:
        width: channels of the first layer; the middle has 4 times as many.
        downsample: None gives partial convolutions of stride 2. A sampler replaces each stride, see `PartialSampler`.
        upsample: None gives nearest-neighbour interpolation of features and mask, as in Liu et al. A sampler replaces it. A 3x3 partial
            convolution follows in both cases.
        norm_layer: takes a number of channels and returns the normalisation layer.
    """

    def __init__(
        self, width: int = 64, *, downsample: Sampler | None = None, upsample: Sampler | None = None, norm_layer: Norm = nn.BatchNorm2d
    ):
        super().__init__()
        samplers = {"down": downsample, "up": upsample or Nearest, "": None}
        channels = [3, *(int(layer.channels * width) for layer in LAYERS)]
        self.stages = nn.ModuleList(
            PartialStage(layer, inputs, outputs, samplers[layer.resize], norm_layer)
            for layer, inputs, outputs in zip(LAYERS, channels, channels[1:], strict=False)
        )
        self.output = PartialConv2d(channels[-1], 3, 3, padding=1)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Complete images [N, 3, H, W] in [-1, 1] whose holes are given by masks [N, 1, H, W], 1 in the hole and 0 elsewhere.

        The content of the hole is ignored. H and W are at least 1. The output for an image without a known pixel is 0.

        Returns:
            Images [N, 3, H, W] in [-1, 1]. The network also predicts the known pixels.

        Raises:
            TypeError, ValueError: the images or the masks have another type or shape, or the upsamplers do not undo the ratio of the
                downsamplers.
        """
        y, known = check_features(images, 3, "images"), 1 - check_features(masks, 1, "masks")
        sizes = []
        for layer, partial_stage in zip(LAYERS, self.stages, strict=True):
            if layer.resize == "down":
                sizes.append(y.shape[2:])
            x = y
            y, known = partial_stage(x, known)
            if layer.resize == "up":
                size = check_fit(x.shape[2:], y.shape[2:], sizes.pop(), "upsample")
                y, known = fit(y, size), fit(known, size)
        return self.output(y, known)[0].clamp(-1, 1)
