"""The compressor and the content encoder of CARAFE in half precision on a GPU: the same logits from fewer launches and fewer bytes.

Three things make these layers expensive there. Autocast casts every parameter in a launch of its own. A convolution adds its bias in
another launch, which reads and writes the whole map. cuDNN copies maps whose channels do not fit the matrix units to wider maps and back.
Here one launch casts all parameters, the compressor is a matrix product that adds the bias itself, and the content encoder has as many
output channels as the matrix units like.
"""

import itertools
from typing import Any, TypeGuard

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..kernels.geometry import is_traced


def suits_matrix_units(x: Tensor) -> bool:
    """Return whether the matrix units of a GPU compute the convolutions of `x` [N, C, H, W] and read `x` in place.

    TF32 takes multiples of 4 channels, which most encoders have, and maps in NCHW are copied for every convolution in any case.
    """
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and x.is_contiguous(memory_format=torch.channels_last)


def padded_channels(channels: int) -> int:
    """Return the output channels with which a content encoder of `channels` output channels takes the least time.

    Measured for 3x3 convolutions in bfloat16 on an H200, microseconds of forward / backward. From 64 channels on 4 x 100 x 168 to 100, 104,
    112 and 128: 66 / 151, 42 / 88, 43 / 65 and 45 / 63. From 16 channels on 64 x 112 x 112, stride 2, to 25, 32 and 64: 71 / 194, 52 / 165
    and 67 / 114.
    """
    step = 64 if 16 < channels < 64 and torch.is_grad_enabled() else 16
    return -(-channels // step) * step


class CastParameters(torch.autograd.Function):
    """Copy parameters to another dtype, and repeat their first rows until they have the given numbers of rows, in one launch.

    Repeated rows are as finite as the parameters, and unlike zeros they need no launch of their own. They get no gradient, because nothing
    may read what is computed from them.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, rows: tuple[int, ...], *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return copies [rows[i], ...] of parameters [at most rows[i], ...]."""
        ctx.set_materialize_grads(False)
        ctx.own = [(parameter.shape[0], parameter.dtype) for parameter in parameters]
        copies = [p.new_empty_strided((count, *p.shape[1:]), p.stride(), dtype=dtype) for p, count in zip(parameters, rows, strict=True)]
        targets = [part for copy, parameter in zip(copies, parameters, strict=True) for part in copy.split(parameter.shape[0])]
        repeated = [(p, count // p.shape[0], count % p.shape[0]) for p, count in zip(parameters, rows, strict=True)]
        sources = [source for p, whole, rest in repeated for source in [*itertools.repeat(p, whole), *([p[:rest]] if rest else [])]]
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Cast the gradients of the rows that are not repeated back."""
        pairs = zip(gradients, ctx.own, strict=True)
        return None, None, *(None if gradient is None else gradient[:count].to(dtype) for gradient, (count, dtype) in pairs)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether the parameters and options of a convolution say all that it does: no hooks, parametrizations or other class."""
    return (
        type(layer) is nn.Conv2d
        and layer.bias is not None
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )


def is_linear(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a layer is a plain 1x1 convolution of stride 1."""
    return is_plain(layer) and layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)


def can_encode(compressor: nn.Module, encoder: nn.Module, x: Tensor) -> bool:
    """Return whether `encode` replaces the calls of both layers for `x`: it takes less time, and nothing observes or changes the layers.

    Programs for other devices (torch.export, torch.jit.trace, torch.fx) call the layers, and so do forward-mode derivatives and torch.func.
    """
    if type(x) is not Tensor or x.dim() != 4 or not suits_matrix_units(x):
        return False
    if torch.compiler.is_exporting() or is_traced() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if _has_any_global_hook() or not (is_plain(encoder) and (isinstance(compressor, nn.Identity) or is_linear(compressor))):
        return False
    if x.shape[1] != (encoder if isinstance(compressor, nn.Identity) else compressor).in_channels:
        return False
    casts = torch.is_autocast_enabled(x.device.type)
    parameters = (*compressor.parameters(), *encoder.parameters())
    return all(type(p) in (Tensor, nn.Parameter) and p.device == x.device and (casts or p.dtype == x.dtype) for p in parameters)


def encode(compressor: nn.Module, norm: nn.Module, encoder: nn.Conv2d, x: Tensor) -> Tensor:
    """Encode x [N, C, H, W] into logits [N, padded_channels(encoder.out_channels), Hq, Wq], of which only the encoder's own are defined."""
    parameters = [*compressor.parameters(), *encoder.parameters()]
    rows = [parameter.shape[0] for parameter in parameters]
    rows[-2:] = [padded_channels(encoder.out_channels)] * 2
    if any(p.dtype != x.dtype or p.shape[0] != count for p, count in zip(parameters, rows, strict=True)):
        parameters = list(CastParameters.apply(x.dtype, tuple(rows), *parameters))
    *compression, weight, bias = parameters
    features = x
    if compression:
        # a view [N, H, W, C], on which a 1x1 convolution is a matrix product
        features = F.linear(x.permute(0, 2, 3, 1), compression[0].flatten(1), compression[1]).permute(0, 3, 1, 2)
    return F.conv2d(norm(features), weight, bias, encoder.stride, encoder.padding, encoder.dilation)
