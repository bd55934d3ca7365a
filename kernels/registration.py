"""The operator as torch.library ops: schemas, shape functions, derivatives to any order, batching.

There are two ops. `carafepp::reassemble` computes y and, for the normalised kernels, one log-sum-exp per window and group;
`carafepp::reassemble_backward` computes dx and dlogits from dy, x, logits and the log-sum-exp. With normalizer "none", the operator is
bilinear in x and the weights, so that the derivative of its backward consists of the same two ops, and so on to any order.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import register_decomposition
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .borders import mask_outside
from .decomposed import decompose, decompose_backward
from .execution import (
    Layouts,
    Options,
    backward,
    compute_features,
    compute_gradients,
    compute_outputs,
    empty_gradients,
    empty_outputs,
    find_layouts,
    forward,
)
from .observers import is_observed
from .reference import normalize, normalize_backward, normalize_forward

# the schemas give the parameter types of the functions that the dispatcher and autograd call
# pyright: reportMissingParameterType=false

# `torch.library.custom_op` would wrap the op in code that takes more host time than the rest of a call on a GPU
LIBRARY = torch.library.Library("carafepp", "FRAGMENT")
OPTIONS = (
    "SymInt[] size, SymInt kernel_size, SymInt up, SymInt down, SymInt groups, str normalizer, str border, bool at_targets, str? backend"
)
SCHEMAS = (
    f"reassemble(Tensor x, Tensor logits, {OPTIONS}) -> (Tensor y, Tensor lse)",
    f"reassemble_backward(Tensor dy, Tensor x, Tensor logits, Tensor lse, {OPTIONS}, bool need_dx, bool need_dlogits) -> (Tensor, Tensor)",
)
for schema in SCHEMAS:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
reassemble_op = torch.ops.carafepp.reassemble.default
reassemble_backward_op = torch.ops.carafepp.reassemble_backward.default

# PyTorch has one level of forward mode; a compiled graph enters it without setting `forward_ad._current_level`, the default
LEVEL = 0


def _apply_to_tangents(jvp):
    """Let the outer levels of torch.func see what the `jvp` of an autograd function does; forward mode is switched off inside one."""

    @functools.wraps(jvp)
    def run(ctx, *tangents):
        saved = [forward_ad.unpack_dual(tensor, level=LEVEL).primal for tensor in ctx.saved_tensors]
        if not torch._C._are_functorch_transforms_active():
            return jvp(ctx, *saved, *tangents)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *saved, *tangents)

    return run


def _forward_below_autograd(x, logits, options):
    """Compute y and lse inside an autograd function, which records the call as a whole."""
    if not is_observed(x, logits):
        return compute_outputs(x, logits, find_layouts(x.shape, x.stride(), options))
    return _call_below_autograd(reassemble_op, x, logits, *options)


def _backward_below_autograd(dy, x, logits, lse, options, need_dx, need_dlogits):
    if not is_observed(dy, x, logits, lse):
        return compute_gradients(dy, x, logits, lse, find_layouts(x.shape, x.stride(), options), need_dx, need_dlogits)
    return _call_below_autograd(reassemble_backward_op, dy, x, logits, lse, *options, need_dx, need_dlogits)


def _call_below_autograd(op, *arguments):
    """Call an op from its own autograd kernel: autograd records the call as a whole.

    Inside an autograd function, gradients are switched off. The outer levels of torch.func still need them.
    """
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return op(*arguments)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return op(*arguments)


def _windows(logits: Tensor, options: Options) -> Tensor:
    """View logits as [N, G, K * K, up, up, Hq, Wq], or [N, G, K * K, Ho, Wo] at targets; further channels are left out."""
    channels = options.groups * options.kernel_size**2
    used = logits[:, : channels if options.at_targets else channels * options.up**2]
    subs = () if options.at_targets else (options.up, options.up)
    return used.unflatten(1, (options.groups, options.kernel_size**2, *subs))


def _weights(x: Tensor, logits: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return the windows of the logits, as they are normalised, and their weights."""
    windows = _windows(logits, options)
    if options.border == "renormalize":
        windows = mask_outside(windows, options.spec, *x.shape[2:])
    return windows, normalize(windows, options.normalizer)


def _bilinear(options: Options) -> Options:
    """Return the options of the same sum with given weights; those of taps that "renormalize" leaves out are 0."""
    return options._replace(normalizer="none", border="zero" if options.border == "renormalize" else options.border)


def _differentiate(ctx, dy):
    """Return the gradients of the arguments of a call whose tensors and options are in `ctx`."""
    x, logits, lse = ctx.saved_tensors
    need_dx, need_dlogits, _ = ctx.needs_input_grad
    compute = _differentiable_backward if torch.is_grad_enabled() else _backward_below_autograd
    dx, dlogits = compute(dy, x, logits, lse, ctx.options, need_dx, need_dlogits)
    return dx if need_dx else None, dlogits if need_dlogits else None, None


class SingleLevelFunction(_SingleLevelFunction):
    """An autograd function whose `apply` takes less host time: it does not ask for the levels of torch.func."""

    # compiled autograd asks for it; PyTorch defines it one class below
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)  # pyright: ignore[reportAttributeAccessIssue]


class _UnobservedReassemble(SingleLevelFunction):
    """The differentiable call that only autograd sees: y alone, without what transforms and forward mode need."""

    @staticmethod
    def forward(ctx, x, logits, layouts):
        y, lse = compute_outputs(x, logits, layouts)
        ctx.options = layouts.options
        ctx.save_for_backward(x, logits, lse)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _differentiate(ctx, dy)


class _Reassemble(SingleLevelFunction):
    @staticmethod
    def forward(x, logits, options):
        return _forward_below_autograd(x, logits, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, logits, ctx.options = inputs
        _, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, logits, lse)
        ctx.save_for_forward(x, logits)

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None
        return _differentiate(ctx, dy)

    @staticmethod
    @_apply_to_tangents
    def jvp(ctx, x, logits, x_tangent, logits_tangent, _):
        windows, weights = _weights(x, logits, ctx.options)
        y_tangent = None
        if x_tangent is not None:
            y_tangent = reassemble_op(x_tangent, logits, *ctx.options)[0]
        if logits_tangent is not None:
            change = normalize_forward(_windows(logits_tangent, ctx.options), weights, windows, ctx.options.normalizer)
            part = reassemble_op(x, change.flatten(1, -3), *_bilinear(ctx.options))[0]
            y_tangent = part if y_tangent is None else y_tangent + part
        return y_tangent, None


def _differentiable_backward(
    dy: Tensor, x: Tensor, logits: Tensor, _: Tensor, options: Options, need_dx: bool, need_dlogits: bool
) -> tuple[Tensor, Tensor]:
    """Compute the same gradients with bilinear and elementwise ops, so that they can be differentiated again."""
    windows, weights = _weights(x, logits, options)
    none = x.new_empty(0)
    dx, dweights = reassemble_backward_op(dy, x, weights.flatten(1, -3), none, *_bilinear(options), need_dx, need_dlogits)
    if not need_dlogits:
        return dx, dweights
    dwindows = normalize_backward(dweights.view(windows.shape), weights, windows, options.normalizer)
    dlogits = dwindows.flatten(1, -3)
    unread = logits.shape[1] - dlogits.shape[1]
    return dx, F.pad(dlogits, (0, 0, 0, 0, 0, unread)) if unread else dlogits


class _ReassembleBackward(SingleLevelFunction):
    @staticmethod
    def forward(dy, x, weights, lse, options, need_dx, need_dlogits):
        return _backward_below_autograd(dy, x, weights, lse, options, need_dx, need_dlogits)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, weights, _, ctx.options, ctx.need_dx, ctx.need_dlogits = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weights)
        ctx.save_for_forward(dy, x, weights)

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

    @staticmethod
    @_apply_to_tangents
    def jvp(ctx, dy, x, weights, dy_tangent, x_tangent, weights_tangent, *_):
        """Push tangents through the same bilinear maps."""
        lse = x.new_empty(0)

        def push(place, *factors):
            """Sum result number `place` for those of the given triples (dy, x, weights) that are complete."""
            needs = place == 0, place == 1
            complete = [triple for triple in factors if all(factor is not None for factor in triple)]
            parts = [reassemble_backward_op(*triple, lse, *ctx.options, *needs)[place] for triple in complete]
            return sum(parts[1:], parts[0]) if parts else None

        # a result that is not needed has no elements, and so has its tangent
        dx = push(0, (dy_tangent, x, weights), (dy, x, weights_tangent)) if ctx.need_dx else x.new_zeros(0)
        dweights = push(1, (dy_tangent, x, weights), (dy, x_tangent, weights)) if ctx.need_dlogits else x.new_zeros(0)
        return dx, dweights


def _fold(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """Fold a batch of tensors [N, ...], stacked along `dim`, into N; without `dim`, one tensor is repeated."""
    stacked = tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return stacked.flatten(0, 1) if tensor.dim() > 1 or dim is not None else tensor


def _unfold(results: tuple[Tensor, Tensor], batch_size: int, n: int) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Undo `_fold` for the results of an op on N = `n`, and say where their batch is; an empty result stays one."""
    batched = [result.dim() > 1 for result in results]
    unfolded = tuple(
        result.unflatten(0, (batch_size, n)) if has_batch else result for result, has_batch in zip(results, batched, strict=True)
    )
    return unfolded, tuple(0 if has_batch else None for has_batch in batched)


def _batch_forward(info, in_dims, x, logits, *options):
    """Compute a batch of problems as one problem of a larger N."""
    n = x.shape[in_dims[0] == 0]
    x, logits = (_fold(t, dim, info.batch_size) for t, dim in zip((x, logits), in_dims[:2], strict=True))
    return _unfold(reassemble_op(x, logits, *options), info.batch_size, n)


def _batch_backward(info, in_dims, dy, x, logits, lse, *options):
    n = x.shape[in_dims[1] == 0]
    tensors = (_fold(t, dim, info.batch_size) for t, dim in zip((dy, x, logits, lse), in_dims[:4], strict=True))
    return _unfold(reassemble_backward_op(*tensors, *options), info.batch_size, n)


def _records(*tensors: Tensor) -> bool:
    """Return whether a call on these tensors is differentiated: autograd records it, or one of them has a tangent."""
    recorded = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])
    return recorded or any([forward_ad.unpack_dual(tensor, level=LEVEL).tangent is not None for tensor in tensors])


def _apply(function, *arguments):
    """Apply an autograd function to the tensors of one level of torch.func, as an autograd kernel of PyTorch does.

    `torch.autograd.Function` would dispatch to all levels again, which the dispatcher has done before it calls an autograd kernel.
    """
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    with enable_single_level_autograd_function():
        return function.apply(*arguments)


def _autograd_forward(x, logits, *options):
    if _records(x, logits):
        return _apply(_Reassemble, x, logits, Options.read(*options))
    return _forward_below_autograd(x, logits, Options.read(*options))


def _autograd_backward(dy, x, logits, lse, *options):
    *given, need_dx, need_dlogits = options
    read = Options.read(*given)
    if not _records(dy, x, logits):
        return _backward_below_autograd(dy, x, logits, lse, read, need_dx, need_dlogits)
    if read.normalizer != "none":
        # a level of torch.func that records nothing, or a traced graph, hands the gradients of logits to one that differentiates them
        return _differentiable_backward(dy, x, logits, lse, read, need_dx, need_dlogits)
    return _apply(_ReassembleBackward, dy, x, logits, lse, read, need_dx, need_dlogits)


def reassemble_unobserved(x: Tensor, logits: Tensor, layouts: Layouts) -> Tensor:
    """Return the y of the op `reassemble` for tensors that are not observed, without the dispatcher."""
    if torch.is_grad_enabled() and (x.requires_grad or logits.requires_grad):
        return _UnobservedReassemble.apply(x, logits, layouts)  # pyright: ignore[reportAttributeAccessIssue]
    return compute_features(x, logits, layouts)


LIBRARY.impl("reassemble", forward, "CompositeExplicitAutograd")
LIBRARY.impl("reassemble", _autograd_forward, "Autograd")
LIBRARY.impl("reassemble_backward", backward, "CompositeExplicitAutograd")
LIBRARY.impl("reassemble_backward", _autograd_backward, "Autograd")
torch.library.register_vmap("carafepp::reassemble", _batch_forward, lib=LIBRARY)
torch.library.register_vmap("carafepp::reassemble_backward", _batch_backward, lib=LIBRARY)


@torch.library.register_fake("carafepp::reassemble", lib=LIBRARY)
def _shape_forward(x, logits, *options):
    return empty_outputs(x, Options.read(*options))


@torch.library.register_fake("carafepp::reassemble_backward", lib=LIBRARY)
def _shape_backward(dy, x, logits, lse, *options):
    *_, need_dx, need_dlogits = options
    return empty_gradients(x, logits, need_dx, need_dlogits)


# torch.onnx.export reads this table, while torch.export and torch.compile have tables of their own and keep the ops
register_decomposition(reassemble_op)(decompose)
register_decomposition(reassemble_backward_op)(decompose_backward)
# without an entry in this table, fake tensors of symbolic sizes would run the decompositions
register_decomposition(reassemble_op, type="meta")(_shape_forward)
register_decomposition(reassemble_backward_op, type="meta")(_shape_backward)
