"""CARAFE in half precision on a GPU without gradients: its layers and the operator as launches that are planned once for each layout."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from ..kernels.backends import HAS_TRITON
from ..kernels.geometry import Spec, is_channels_last
from ..kernels.observers import PLAIN, is_intercepted
from ..kernels.reassembly import check_layouts, is_plain_size
from .half_encoder import find_parameters, is_hooked, padded_channels, read_tensors


@functools.cache
def _launches() -> Any:
    """Import the launches, which need Triton."""
    return importlib.import_module("..kernels.gpu.inference", __package__)


def read_norm(norm: nn.Module) -> tuple[Sequence[Tensor | None], float, bool] | None:
    """Return what a norm of the compressor computes without statistics of the batch.

    Returns:
        Running mean and variance, scale and shift, or None for all; the eps of the variance; whether a ReLU follows. None if only the
        module itself can tell.
    """
    if is_hooked(norm):
        return None
    if type(norm) is nn.Identity:
        return (None,) * 4, 0.0, False
    layers = list(norm._modules.values()) if type(norm) is nn.Sequential else []
    if len(layers) != 2 or type(layers[1]) is not nn.ReLU or any([is_hooked(cast(nn.Module, layer)) for layer in layers]):
        return None
    affine = layers[0]
    if type(affine) is nn.Identity:
        return (None,) * 4, 0.0, True
    if type(affine) is not nn.BatchNorm2d or affine.training:
        return None
    tensors = read_tensors(affine, "running_mean", "running_var", "weight", "bias")
    return (tensors, affine.eps, True) if all([type(tensor) in PLAIN for tensor in tensors]) else None


def infer(compressor: nn.Module, norm: nn.Module, encoder: nn.Module, x: Tensor, spec: Spec, size: Sequence[int] | None) -> Tensor | None:
    """Compute the module for an x [N, C, H, W] that suits matrix units; None if its layers and the operator must be called.

    Raises:
        ValueError: `size` is wrong, or the logits of the encoder do not fit.
    """
    if not HAS_TRITON or torch.is_grad_enabled() or is_intercepted() or not is_plain_size(size):
        return None
    parameters = find_parameters(compressor, encoder, x)
    read = read_norm(norm)
    if parameters is None or read is None:
        return None
    statistics, eps, rectified = read
    given = [*(parameters if len(parameters) == 4 else (None, None, *parameters))]
    given[2:2] = statistics
    addresses = [0 if t is None else t.data_ptr() for t in given]
    # code may rely on this alignment
    if x.data_ptr() % 16 or any([address % 16 for address in addresses]):
        return None
    conv = cast(nn.Conv2d, encoder)
    geometry = conv.stride, conv.padding, conv.dilation
    # what a convolution also takes: an integer, a list, the name of a padding
    if any([type(sides) is not tuple for sides in geometry]):
        return None
    layouts = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in (x, *given)]
    key = (spec, size, eps, rectified, *geometry, *layouts)
    plans = _launches().plans
    planned = plans.get(key)
    if planned is None:
        planned = plans.keep(key, _plan(x, given, eps, rectified, conv, spec, size))
    return planned.run(x, given, addresses) if planned else None


def _fit(x: Tensor, given: list[Tensor | None]) -> bool:
    """Return whether the parameters are on the device of x and have the shapes that the layers need for it, vectors without gaps."""
    compressor, weight, channels = given[0], cast(Tensor, given[-2]), x.shape[1]
    if weight.dim() != 4 or (compressor is None and weight.shape[1] != channels):
        return False
    outputs, width = weight.shape[:2]
    shapes = (width, channels, 1, 1), *[(width,)] * 5, weight.shape, (outputs,)
    required = [(t, shape) for t, shape in zip(given, shapes, strict=True) if t is not None]
    return all(t.device == x.device and t.shape == shape and (t.dim() > 1 or t.is_contiguous()) for t, shape in required)


def _plan(
    x: Tensor, given: list[Tensor | None], eps: float, rectified: bool, conv: nn.Conv2d, spec: Spec, size: tuple[int, int] | None
) -> Any:
    """Plan the launches for a layout, or return False if there are none for it."""
    # a map of one pixel may be in NCHW as well, for which the operator may need a copy
    if not is_channels_last(x) or not _fit(x, given):
        return False
    weight = cast(Tensor, given[-2])
    outputs, width, *kernel = weight.shape
    sides = zip(x.shape[2:], cast(tuple[int, int], conv.padding), conv.dilation, kernel, conv.stride, strict=True)
    cells = [(side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1 for side, padding, dilation, taps, stride in sides]
    shape = torch.Size((x.shape[0], outputs, *cells))
    layouts = check_layouts(x.shape, x.stride(), x.dtype, x.device, shape, spec, size, None, "logits")
    launching = _launches()
    parameters = launching.Parameters(*given)
    # an output that repeats its last rows is filled in steps
    if layouts is None or layouts.core or not x.numel() or not launching.runs_on(x, parameters):
        return False
    layers = launching.Layers(
        given[0] is not None,
        given[2] is not None,
        rectified,
        eps,
        width,
        outputs,
        padded_channels(outputs),
        *kernel,
        *conv.stride,
        *conv.padding,
        *conv.dilation,
    )
    return launching.Inference(x, parameters, layers, layouts)
