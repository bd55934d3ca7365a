"""CARAFE in half precision on a GPU with gradients: its layers and the operator as one node of the graph, planned once for each layout."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels.geometry import Spec
from ..kernels.observers import is_indirect, is_intercepted
from ..kernels.reassembly import reassemble
from ..kernels.registration import SingleLevelFunction
from .inference import find_plan


def compute_layers(planned: Any, x: Tensor, given: Sequence[Tensor | None]) -> Tensor:
    """Compute the output with PyTorch's functions, for derivatives of higher order, and without changing running statistics."""
    layers, layouts = planned.layers, planned.layouts
    weight, bias, mean, variance, scale, shift, encoder_weight, encoder_bias = given
    features = x
    if weight is not None:
        features = F.conv2d(x, weight.to(x.dtype), cast(Tensor, bias).to(x.dtype))
    if layers.batch:
        mean = variance = None
    if layers.normalized:
        features = F.batch_norm(features, mean, variance, scale, shift, layers.batch, 0.0, layers.eps)
    if layers.rectified:
        features = features.relu()
    geometry: Any = [(getattr(layers, f"{name}_h"), getattr(layers, f"{name}_w")) for name in ("stride", "padding", "dilation")]
    logits = F.conv2d(features, cast(Tensor, encoder_weight).to(x.dtype), cast(Tensor, encoder_bias).to(x.dtype), *geometry)
    return reassemble(x, logits, **layouts.spec._asdict(), size=layouts.y_shape[2:])


class Train(SingleLevelFunction):
    """The module as one differentiable call that only autograd sees."""

    @staticmethod
    def forward(ctx: Any, found: Any, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """Return the output; the parameters are those of `kernels.gpu.layer.training.Gradients`."""
        ctx.planned = found.planned
        y, kept = found.planned.forward(x, found.given, found.addresses)
        ctx.save_for_backward(kept, x, *found.given[:8])
        ctx.strides = read_strides(x, *found.given[:8])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the parameters."""
        kept, x, *given = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        # hooks of saved tensors may store them in other layouts, as `torch.autograd.graph.save_on_cpu(pin_memory=True)` does
        moved = read_strides(x, *given) != ctx.strides
        if moved or torch.is_grad_enabled() or is_intercepted() or is_indirect(dy):
            return None, *differentiate(ctx.planned, dy, x, given, needs)
        return None, *ctx.planned.backward(dy, x, kept, given, needs)


def read_strides(*tensors: Tensor | None) -> list[tuple[int, ...] | None]:
    """Return the strides of tensors."""
    return [None if tensor is None else tensor.stride() for tensor in tensors]


def differentiate(planned: Any, dy: Tensor, x: Tensor, given: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Compute the gradients with PyTorch's functions, and record this if gradients are recorded."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        # of views, because x may be the result of another call with the same parameters
        inputs = [t.view_as(t) if t is not None and need else t for t, need in zip((x, *given[:2], *given[4:]), needs, strict=True)]
        source, weight, bias, scale, shift, *encoder = inputs
        y = compute_layers(planned, cast(Tensor, source), (weight, bias, *given[2:4], scale, shift, *encoder))
    needed = [cast(Tensor, t) for t, need in zip(inputs, needs, strict=True) if need]
    gradients = iter(torch.autograd.grad(y, needed, dy, create_graph=recorded))
    return [next(gradients) if need else None for need in needs]


def train(compressor: nn.Module, norm: nn.Module, encoder: nn.Module, x: Tensor, spec: Spec, size: Sequence[int] | None) -> Tensor | None:
    """Compute the module with gradients; arguments, results and errors are those of `find_plan`, with the output in place of a plan."""
    found = find_plan(compressor, norm, encoder, x, spec, size, True)
    if found is None:
        return None
    if not found.trained:
        return found.planned.run(x, found.given[:8], found.addresses[:8])
    weight, bias, _, _, *parameters = found.given[:8]
    return Train.apply(found, x, weight, bias, *parameters)  # pyright: ignore[reportAttributeAccessIssue]
