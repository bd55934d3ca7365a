"""CARAFE in half precision on a GPU without gradients: its layers and the operator as launches that are planned once for each layout."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn as nn
from torch import Tensor

from ..kernels.backends import HAS_TRITON
from ..kernels.geometry import Spec, is_channels_last
from ..kernels.observers import PLAIN, is_intercepted
from ..kernels.reassembly import check_layouts, is_plain_size
from .half_encoder import find_parameters, is_frozen_norm, is_hooked, padded_channels, read_tensors


@functools.cache
def _launches() -> Any:
    """Import the launches, which need Triton."""
    return importlib.import_module("..kernels.gpu.layer.inference", __package__)


class Norm(NamedTuple):
    """What a norm of the compressor computes."""

    tensors: Sequence[Tensor | None]  # running mean and variance, scale and shift; None for all without a norm
    eps: float  # of the variance
    rectified: bool  # whether a ReLU follows
    momentum: float | None = None  # of the running statistics, if the norm takes the statistics of the batch
    batches: Tensor | None = None  # the number of batches, in that case


def read_norm(norm: nn.Module) -> Norm | None:
    """Return what a norm of the compressor computes, or None if only the module itself can tell."""
    if is_hooked(norm):
        return None
    if type(norm) is nn.Identity:
        return Norm((None,) * 4, 0.0, False)
    layers = list(norm._modules.values()) if type(norm) is nn.Sequential else []
    if len(layers) != 2 or type(layers[1]) is not nn.ReLU or any([is_hooked(cast(nn.Module, layer)) for layer in layers]):
        return None
    affine = cast(Any, layers[0])
    kind = type(affine)
    if kind is nn.Identity:
        return Norm((None,) * 4, 0.0, True)
    fixed = is_frozen_norm(kind)
    if not (fixed or kind is nn.BatchNorm2d or (kind is nn.SyncBatchNorm and not affine.training)):
        return None
    tensors = read_tensors(affine, "running_mean", "running_var", "weight", "bias")
    if not all([type(tensor) in PLAIN for tensor in tensors]):
        return None
    if fixed or not affine.training:
        return Norm(tensors, affine.eps, True)
    (batches,) = read_tensors(affine, "num_batches_tracked")
    # without a momentum, the running statistics are averages over all batches
    return None if affine.momentum is None or type(batches) is not Tensor else Norm(tensors, affine.eps, True, affine.momentum, batches)


class Found(NamedTuple):
    """A call whose launches are planned."""

    planned: Any
    given: list[Tensor | None]  # the parameters, and the number of batches
    addresses: list[int]  # theirs
    trained: bool  # whether the plan is a `kernels.gpu.layer.training.Training`, not a `kernels.gpu.layer.inference.Inference`


def find_plan(
    compressor: nn.Module, norm: nn.Module, encoder: nn.Module, x: Tensor, spec: Spec, size: Sequence[int] | None, trained: bool
) -> Found | None:
    """Return the plan of the module for an x [N, C, H, W] that suits matrix units; None if its layers and the operator must be called.

    `trained` asks for a `kernels.gpu.layer.training.Training` in place of a `kernels.gpu.layer.inference.Inference`, unless nothing needs a
    gradient.

    Raises:
        ValueError: `size` is wrong, or the logits of the encoder do not fit.
    """
    if not HAS_TRITON or is_intercepted() or not is_plain_size(size):
        return None
    parameters = find_parameters(compressor, encoder, x)
    read = read_norm(norm)
    if parameters is None or read is None or (read.momentum is not None and not trained):
        return None
    given = [*(parameters if len(parameters) == 4 else (None, None, *parameters)), read.batches]
    given[2:2] = read.tensors
    trained = trained and (read.momentum is not None or x.requires_grad or any([t is not None and t.requires_grad for t in given]))
    # the gradients of a norm with running statistics are not among the launches
    if trained and read.momentum is None and any([t is not None and t.requires_grad for t in read.tensors]):
        return None
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
    key = (spec, size, trained, *read[1:4], *geometry, *layouts)
    plans = _launches().plans
    planned = plans.get(key)
    if planned is None:
        planned = plans.keep(key, _plan(x, given, read, conv, spec, size, trained))
    return Found(planned, given, addresses, trained) if planned else None


def infer(compressor: nn.Module, norm: nn.Module, encoder: nn.Module, x: Tensor, spec: Spec, size: Sequence[int] | None) -> Tensor | None:
    """Compute the module without gradients; arguments, results and errors are those of `find_plan`, with the output in place of a plan."""
    found = None if torch.is_grad_enabled() else find_plan(compressor, norm, encoder, x, spec, size, False)
    return found and found.planned.run(x, found.given[:8], found.addresses[:8])


def _fit(x: Tensor, given: list[Tensor | None]) -> bool:
    """Return whether the parameters are on the device of x and have the shapes that the layers need for it, vectors without gaps."""
    compressor, weight, channels = given[0], cast(Tensor, given[6]), x.shape[1]
    if weight.dim() != 4 or (compressor is None and weight.shape[1] != channels):
        return False
    outputs, width = weight.shape[:2]
    shapes = (width, channels, 1, 1), *[(width,)] * 5, weight.shape, (outputs,), ()
    required = [(t, shape) for t, shape in zip(given, shapes, strict=True) if t is not None]
    return all(t.device == x.device and t.shape == shape and (t.dim() > 1 or t.is_contiguous()) for t, shape in required)


def _plan(
    x: Tensor, given: list[Tensor | None], norm: Norm, conv: nn.Conv2d, spec: Spec, size: tuple[int, int] | None, trained: bool
) -> Any:
    """Plan the launches for a layout, or return False if there are none for it."""
    # a map of one pixel may be in NCHW as well, for which the operator may need a copy
    if not is_channels_last(x) or not _fit(x, given):
        return False
    # PyTorch refuses the statistics of a single pixel, and gradients have the strides of parameters, which must not overlap
    if trained and (x.numel() == x.shape[1] or any(t is not None and torch.empty_like(t).stride() != t.stride() for t in given)):
        return False
    *parameters, _ = given
    outputs, width, *kernel = cast(Tensor, given[6]).shape
    sides = zip(x.shape[2:], cast(tuple[int, int], conv.padding), conv.dilation, kernel, conv.stride, strict=True)
    cells = [(side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1 for side, padding, dilation, taps, stride in sides]
    shape = torch.Size((x.shape[0], outputs, *cells))
    layouts = check_layouts(x.shape, x.stride(), x.dtype, x.device, shape, spec, size, None, "logits")
    launching = _launches()
    # an output that repeats its last rows is filled in steps
    if layouts is None or layouts.core or not x.numel() or not launching.runs_on(x, launching.Parameters(*parameters)):
        return False
    layers = launching.Layers(
        given[0] is not None,
        given[2] is not None,
        norm.rectified,
        norm.eps,
        width,
        outputs,
        padded_channels(outputs, trained=False),
        *kernel,
        *conv.stride,
        *conv.padding,
        *conv.dilation,
        norm.momentum is not None,
        norm.momentum or 0.0,
        padded_channels(outputs, trained=True) if trained else 0,
    )
    if layers.rectified and not layers.compressed:
        return False
    if trained:
        return importlib.import_module("..kernels.gpu.layer.training", __package__).Training(x, layers, layouts)
    return launching.Inference(x, launching.Parameters(*parameters), layers, layouts)
