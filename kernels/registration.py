"""The operator as torch.library ops: schemas, shape functions, autograd to any order.

There are two ops. `carafepp::reassemble` computes y and, for the normalised kernels, one log-sum-exp per window and group;
`carafepp::reassemble_backward` computes dx and dlogits from dy, x, logits and the log-sum-exp. With normalizer "none", the operator is
bilinear in x and the weights, so that the derivative of its backward consists of the same two ops, and so on to any order.

Inside the ops the logits have six dimensions, [N, G * K * K, up, up, Hq, Wq]: logits in encoder layout and weights at output resolution are
both views of this form, and are read in place by their strides.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .backends import implementation
from .geometry import LSE_NORMALIZERS, Spec, memory_format
from .reference import normalize, normalize_backward

# the schemas give the parameter types of the functions that the dispatcher and autograd call
# pyright: reportMissingParameterType=false

# `torch.library.custom_op` would wrap the op in code that takes more host time than the rest of a call on a GPU
LIBRARY = torch.library.Library("carafepp", "FRAGMENT")
OPTIONS = "SymInt kernel_size, SymInt up, SymInt down, SymInt groups, str normalizer, str? backend"
SCHEMAS = (
    f"reassemble(Tensor x, Tensor logits, {OPTIONS}) -> (Tensor y, Tensor lse)",
    f"reassemble_backward(Tensor dy, Tensor x, Tensor logits, Tensor lse, {OPTIONS}, bool need_dx, bool need_dlogits) -> (Tensor, Tensor)",
)
for schema in SCHEMAS:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
reassemble_op = torch.ops.carafepp.reassemble.default
reassemble_backward_op = torch.ops.carafepp.reassemble_backward.default


class Options(NamedTuple):
    """The options of one call of an op, in the order of the schemas: those of a Spec, and the backend."""

    kernel_size: int
    up: int
    down: int
    groups: int
    normalizer: str
    backend: str | None


def empty_outputs(x: Tensor, logits: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Allocate y and lse for `x` [N, C, H, W] and `logits` [N, G * K * K, up, up, Hq, Wq]."""
    n, c, h, w = x.shape
    size = (n, c, spec.output_size(h), spec.output_size(w))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    lse_size = (n, spec.groups, *logits.shape[2:]) if spec.normalizer in LSE_NORMALIZERS else (0,)
    return y, x.new_empty(lse_size, dtype=torch.promote_types(x.dtype, torch.float32))


def empty_gradients(x: Tensor, logits: Tensor, need_dx: bool, need_dlogits: bool) -> tuple[Tensor, Tensor]:
    """Allocate dx and dlogits; a gradient that is not needed has no elements."""
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        torch.empty_like(logits) if need_dlogits else x.new_empty(0),
    )


Op = Callable[..., tuple[Tensor, Tensor]]


def _untraced(function: Op) -> Op:
    """Keep torch.compile from tracing `function`.

    torch.compiler.disable imports the whole compiler, which takes seconds. It is therefore applied only after something else has
    imported it.
    """

    @functools.cache
    def disabled() -> Op:
        return cast(Op, torch.compiler.disable(function))

    @functools.wraps(function)
    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        return (disabled() if "torch._dynamo" in sys.modules else function)(*arguments)

    return run


@_untraced
def _forward(x, logits, kernel_size, up, down, groups, normalizer, backend):
    spec = Spec(kernel_size, up, down, groups, normalizer)
    y, lse = empty_outputs(x, logits, spec)
    if y.numel():
        implementation(backend, x.device, x.dtype).forward(x, logits, y, lse, spec)
    return y, lse


@_untraced
def _backward(dy, x, logits, lse, kernel_size, up, down, groups, normalizer, backend, need_dx, need_dlogits):
    dx, dlogits = empty_gradients(x, logits, need_dx, need_dlogits)
    if dy.numel():
        spec = Spec(kernel_size, up, down, groups, normalizer)
        results = dx if need_dx else None, dlogits if need_dlogits else None
        implementation(backend, x.device, x.dtype).backward(dy, x, logits, lse, *results, spec)
    return dx, dlogits


class _Reassemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, logits, options):
        with torch._C._AutoDispatchBelowAutograd():
            y, lse = reassemble_op(x, logits, *options)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, logits, lse)
        return y, lse

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None
        x, logits, lse = ctx.saved_tensors
        need_dx, need_dlogits, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx, dlogits = _differentiable_backward(dy, x, logits, ctx.options, need_dx, need_dlogits)
        else:
            dx, dlogits = reassemble_backward_op(dy, x, logits, lse, *ctx.options, need_dx, need_dlogits)
        return dx if need_dx else None, dlogits if need_dlogits else None, None


def _differentiable_backward(
    dy: Tensor, x: Tensor, logits: Tensor, options: Options, need_dx: bool, need_dlogits: bool
) -> tuple[Tensor, Tensor]:
    """Compute the same gradients with bilinear and elementwise ops, so that they can be differentiated again."""
    windows = logits.unflatten(1, (options.groups, -1))  # [N, G, K * K, up, up, Hq, Wq]
    weights = normalize(windows, options.normalizer)
    bilinear = options._replace(normalizer="none")
    dx, dweights = reassemble_backward_op(dy, x, weights.flatten(1, 2), x.new_empty(0), *bilinear, need_dx, need_dlogits)
    if not need_dlogits:
        return dx, dweights
    dweights = dweights.unflatten(1, (options.groups, -1))
    return dx, normalize_backward(dweights, weights, windows, options.normalizer).flatten(1, 2)


class _ReassembleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x, weights, lse, options, need_dx, need_dlogits):
        with torch._C._AutoDispatchBelowAutograd():
            results = reassemble_backward_op(dy, x, weights, lse, *options, need_dx, need_dlogits)
        ctx.options, ctx.need_dx, ctx.need_dlogits = options, need_dx, need_dlogits
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weights)
        return results

    @staticmethod
    def backward(ctx, ddx, ddweights):
        """Differentiate the bilinear maps dx = X(dy, w), dw = W(dy, x), with y = Y(x, w); the normalizer is always "none" here."""
        dy, x, weights = ctx.saved_tensors
        ddx = ddx if ctx.need_dx else None
        ddweights = ddweights if ctx.need_dlogits else None
        gdy = gx = gweights = None
        lse = x.new_empty(0)
        if ddx is not None:
            gdy = reassemble_op(ddx, weights, *ctx.options)[0]
            if ctx.needs_input_grad[2]:
                gweights = reassemble_backward_op(dy, ddx, weights, lse, *ctx.options, False, True)[1]
        if ddweights is not None:
            y = reassemble_op(x, ddweights, *ctx.options)[0]
            gdy = y if gdy is None else gdy + y
            if ctx.needs_input_grad[1]:
                gx = reassemble_backward_op(dy, x, ddweights, lse, *ctx.options, True, False)[0]
        return gdy, gx, gweights, None, None, None, None


def _autograd_forward(x, logits, kernel_size, up, down, groups, normalizer, backend):
    if torch.is_grad_enabled():
        return _Reassemble.apply(x, logits, Options(kernel_size, up, down, groups, normalizer, backend))
    with torch._C._AutoDispatchBelowAutograd():
        return reassemble_op(x, logits, kernel_size, up, down, groups, normalizer, backend)


def _autograd_backward(dy, x, logits, lse, kernel_size, up, down, groups, normalizer, backend, need_dx, need_dlogits):
    if torch.is_grad_enabled():
        options = Options(kernel_size, up, down, groups, normalizer, backend)
        return _ReassembleBackward.apply(dy, x, logits, lse, options, need_dx, need_dlogits)
    with torch._C._AutoDispatchBelowAutograd():
        return reassemble_backward_op(dy, x, logits, lse, kernel_size, up, down, groups, normalizer, backend, need_dx, need_dlogits)


LIBRARY.impl("reassemble", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("reassemble", _autograd_forward, "Autograd")
LIBRARY.impl("reassemble_backward", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("reassemble_backward", _autograd_backward, "Autograd")


@torch.library.register_fake("carafepp::reassemble", lib=LIBRARY)
def _(x, logits, kernel_size, up, down, groups, normalizer, backend):
    return empty_outputs(x, logits, Spec(kernel_size, up, down, groups, normalizer))


@torch.library.register_fake("carafepp::reassemble_backward", lib=LIBRARY)
def _(dy, x, logits, lse, kernel_size, up, down, groups, normalizer, backend, need_dx, need_dlogits):
    return empty_gradients(x, logits, need_dx, need_dlogits)
