"""The compressor and the content encoder of CARAFE in half precision on a GPU: the same logits from fewer launches and fewer bytes.

Four things make these layers expensive there. Autocast casts every parameter, and its gradient, in a launch of its own. A convolution adds
its bias in another launch, which reads and writes the whole map. cuDNN copies maps whose channels do not fit the matrix units to wider maps
and back. And the gradients of the input from the compressor and from the operator are added in a launch that reads both. Here one launch
casts all parameters, the compressor is a matrix product that adds its bias, or the other gradient, to its result, and the content encoder
has as many output channels as the matrix units like.
"""

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..kernels.geometry import is_traced, memory_format
from ..kernels.observers import PLAIN


def suits_matrix_units(x: Tensor) -> bool:
    """Return whether the matrix units of a GPU compute the convolutions of `x` [N, C, H, W] and read `x` in place.

    TF32 takes multiples of 4 channels, which most encoders have, and maps in NCHW are copied for every convolution in any case.
    """
    return (
        type(x) is Tensor
        and x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def padded_channels(channels: int, *, trained: bool) -> int:
    """Return the output channels with which a content encoder of `channels` output channels takes the least time.

    Measured for 3x3 convolutions in bfloat16 on an H200, microseconds of forward / backward. From 64 channels on 4 x 100 x 168 to 100, 104,
    112 and 128: 66 / 151, 42 / 88, 43 / 65 and 45 / 63. From 16 channels on 64 x 112 x 112, stride 2, to 25, 32 and 64: 71 / 194, 52 / 165
    and 67 / 114.
    """
    step = 64 if 16 < channels < 64 and trained else 16
    return -(-channels // step) * step


def copy_together(sources: Sequence[Tensor], dtypes: Sequence[torch.dtype], rows: Sequence[int]) -> list[Tensor]:
    """Copy tensors [..., any] to other dtypes in one launch, and repeat their first rows until copy i has `rows[i]` of them.

    Repeated rows are as finite as the others, and unlike zeros they need no launch of their own.
    """
    copies, targets, parts = [], [], []
    for source, dtype, count in zip(sources, dtypes, rows, strict=True):
        own, *others = source.shape
        if count == own:
            copy = torch.empty_like(source, dtype=dtype)
        else:
            # with the strides of the source, further rows might lie between its own
            stored = memory_format(source) if len(others) == 3 else torch.contiguous_format
            copy = torch.empty((count, *others), dtype=dtype, device=source.device, memory_format=stored)
        copies.append(copy)
        for first in range(0, count, own):
            rest = min(own, count - first)
            targets.append(copy if count == own else copy[first : first + rest])
            parts.append(source if rest == own else source[:rest])
    torch._foreach_copy_(targets, parts)  # pyright: ignore[reportPrivateImportUsage]
    return copies


def cast_gradients(gradients: Sequence[Tensor | None], parameters: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor | None]:
    """Cast the gradients of copies to the shapes and dtypes of the parameters; those of repeated rows are left out."""
    own = [None if g is None else g[: shape[0]].view(shape) for g, (shape, _) in zip(gradients, parameters, strict=True)]
    dtypes = [dtype for _, dtype in parameters]
    if torch.is_grad_enabled() or all(g is None or g.dtype == dtype for g, dtype in zip(own, dtypes, strict=True)):
        return [None if g is None else g.to(dtype) for g, dtype in zip(own, dtypes, strict=True)]
    given = [(g, dtype, len(g)) for g, dtype in zip(own, dtypes, strict=True) if g is not None]
    copies = iter(copy_together(*zip(*given, strict=True)))
    return [None if g is None else next(copies) for g in own]


def compress(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve x [N, C, H, W] in channels_last with a 1x1 kernel: a matrix product of the view [N, H, W, C]."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def prepare(x: Tensor, rows: Sequence[int], *parameters: Tensor) -> tuple[Tensor, ...]:
    """Cast parameters of the compressor, if there is one, and of the encoder to the dtype of `x`, repeated to `rows`, and compress `x`.

    Returns:
        Features [N, C_m, H, W] (x itself without a compressor), and the copies of the parameters.
    """
    if parameters[-1].shape[0] != rows[-1] or any([parameter.dtype != x.dtype for parameter in parameters]):
        parameters = tuple(copy_together(parameters, [x.dtype] * len(parameters), rows))
    return compress(x, *parameters[:2]) if len(parameters) == 4 else x.view_as(x), *parameters


class Prepare(torch.autograd.Function):
    """`prepare` with a backward that adds the gradient of x from the compressor to that from the operator as part of the matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Sequence[int], *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return x for the operator, the features, and the weight and bias of the encoder."""
        ctx.set_materialize_grads(False)
        features, *copies = prepare(x, rows, *parameters)
        ctx.parameters = [(p.shape, p.dtype) for p in parameters]
        ctx.save_for_backward(x, *((parameters[0], copies[0]) if len(parameters) == 4 else ()))
        return x, features, *copies[-2:]

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dfeatures: Tensor | None, *dencoder: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the parameters."""
        x, *weights = ctx.saved_tensors
        need_dx, _, *needed = ctx.needs_input_grad
        recorded = torch.is_grad_enabled()
        dcompressor: list[Tensor | None] = [None] * (len(needed) - 2)
        if dfeatures is None:
            pass
        elif not weights:
            dx = dfeatures if dx is None else dx + dfeatures
        else:
            rows, dflat = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (x, dfeatures))  # [N * H * W, C], [N * H * W, C_m]
            dcompressor = [dflat.t() @ rows if needed[0] else None, dflat.sum(0) if needed[1] else None]
            # the copy has no history, which derivatives of higher order need
            weight = (weights[0].to(x.dtype) if recorded else weights[1]).flatten(1)
            if need_dx and dx is not None and not recorded and dx.is_contiguous(memory_format=torch.channels_last):
                # in place, because nothing else has the gradient of the x that this function returned
                dx.permute(0, 2, 3, 1).view(rows.shape).addmm_(dflat, weight)
            elif need_dx:
                part = (dflat @ weight).view(*x.shape[:1], *x.shape[2:], -1).permute(0, 3, 1, 2)
                dx = part if dx is None else dx + part
        return dx, None, *cast_gradients([*dcompressor, *dencoder], ctx.parameters)


def is_frozen_norm(kind: type[nn.Module]) -> bool:
    """Return whether a class is torchvision's FrozenBatchNorm2d, which a network that has it has imported: the import takes a second."""
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__ == "torchvision.ops.misc"


class Forwards(dict[type[nn.Module], Any]):
    """The classes of layers that launches may replace, with their methods before any patch; others have None."""

    def __missing__(self, kind: type[nn.Module]) -> Any:
        code = getattr(kind.forward, "__code__", None) if is_frozen_norm(kind) else None
        # code of another file is a patch
        if code is None or code.co_filename != sys.modules[kind.__module__].__file__:
            return None
        self[kind] = kind.forward
        return kind.forward


LAYERS = nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.Sequential, nn.Identity
FORWARDS = Forwards((kind, kind.forward) for kind in LAYERS)
CALL, CONVOLVE = nn.Module.__call__, nn.Conv2d._conv_forward


def is_hooked(layer: nn.Module) -> bool:
    """Return whether a hook or a replaced method observes or changes a layer, or its class is none of `FORWARDS`."""
    kind = type(layer)
    return bool(
        kind.forward is not FORWARDS[kind]
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
        or "_conv_forward" in layer.__dict__
    )


def read_tensors(layer: nn.Module, *names: str) -> list[Tensor | None]:
    """Return parameters or buffers of a layer by name.

    A look-up takes a fraction of the time of an attribute of a module. Replicas of DataParallel have parameters as attributes only.
    """
    own, buffers = layer._parameters, layer._buffers
    return [own[name] if name in own else buffers[name] if name in buffers else getattr(layer, name) for name in names]


def find_parameters(compressor: nn.Module, encoder: nn.Module, x: Tensor) -> list[Tensor] | None:
    """Return the weight and bias of the compressor, unless it is an identity, and of the encoder, if `encode` may replace both layers.

    The result is None if anything observes or changes the layers, such as hooks, parametrizations or another class, and if the input is
    wrong, for which they raise errors. Programs for other devices (torch.export, torch.jit.trace) call the layers, and so do forward-mode
    derivatives and torch.func.
    """
    if torch.compiler.is_exporting() or is_traced() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    if _has_any_global_hook() or nn.Module.__call__ is not CALL or nn.Conv2d._conv_forward is not CONVOLVE:
        return None
    if is_hooked(compressor) or is_hooked(encoder):
        return None
    layers = (encoder,) if type(compressor) is nn.Identity else (compressor, encoder)
    casts, dtype, device = torch.is_autocast_enabled(x.device.type), x.dtype, x.device
    parameters = []
    for layer in layers:
        if type(layer) is not nn.Conv2d or layer.groups != 1 or layer.padding_mode != "zeros":
            return None
        for parameter in read_tensors(layer, "weight", "bias"):
            if parameter is None or type(parameter) not in PLAIN or parameter.device != device or not (casts or parameter.dtype == dtype):
                return None
            parameters.append(parameter)
    if len(layers) == 2 and not (compressor.kernel_size == compressor.stride == (1, 1) and compressor.padding == (0, 0)):
        return None
    return parameters if x.shape[1] == layers[0].in_channels else None


def encode(compressor: nn.Module, norm: nn.Module, encoder: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Encode x [N, C, H, W], which suits matrix units, in place of a compressor, the norm that follows it, and an encoder.

    Returns:
        x for the operator, and logits [N, padded_channels(encoder.out_channels), Hq, Wq], of which only the encoder's own are defined; or
        None if the layers must be called.
    """
    parameters = find_parameters(compressor, encoder, x)
    if parameters is None:
        return None
    rows = [parameter.shape[0] for parameter in parameters]
    if rows[-2] != rows[-1]:
        return None
    rows[-2:] = [padded_channels(rows[-1], trained=torch.is_grad_enabled())] * 2
    if torch.is_grad_enabled():
        same, features, weight, bias = Prepare.apply(x, rows, *parameters)
        # results of an autograd function need gradients if one of them does
        x = same if x.requires_grad else x
    else:
        features, *_, weight, bias = prepare(x, rows, *parameters)
    conv = cast(nn.Conv2d, encoder)
    return x, F.conv2d(norm(features), weight, bias, conv.stride, conv.padding, conv.dilation)
