"""`reassemble` and `reassemble_weights`: the operator as torch.library ops, differentiable to any order.

Two ops carry everything. `carafepp::reassemble` computes y and, for the normalised kernels, one log-sum-exp per window and group;
`carafepp::reassemble_backward` computes dx and dlogits from dy, x, logits and that statistic. With normalizer "none" the operator is
bilinear in x and the weights, so the derivative of its backward is made of the same two ops, and so on to any order.

Inside the ops the logits have six dimensions, [N, G * K * K, up, up, Hq, Wq]: logits in encoder layout and weights at output
resolution are both views of that form, read in place by their strides.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .geometry import Spec, check_inputs, memory_format
from .reference import normalize, reassemble_reference, weighted_sum

# The modules behind the ops. Each has forward(x, logits, y, lse, spec) and backward(dy, x, logits, lse, dx, dlogits, spec), which fill
# the outputs they are given; dx or dlogits is None where no gradient is asked for, lse has no elements where the normalizer needs none.
MODULES = {"cpu": ".cpu.backend", "triton": ".gpu.backend"}
BACKENDS = ("reference", *MODULES)
# a constant, so that torch.compile need not trace the search
HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = {"triton": (torch.float32, torch.float16, torch.bfloat16)}
DTYPES["cpu"] = (*DTYPES["triton"], torch.float64)
LSE_NORMALIZERS = ("softmax", "sigmoid_normalized")


def default_backend(device_type: str, dtype: torch.dtype) -> str:
    """Name the backend that serves a device: "cpu" on CPU, "triton" on CUDA and ROCm where it is installed, else "reference".

    On a GPU float64 is the definition's as well.
    """
    if device_type == "cuda":
        return "triton" if HAS_TRITON and dtype in DTYPES["triton"] else "reference"
    # a meta tensor takes the shape function of the op, whatever the backend
    return "cpu" if device_type in ("cpu", "meta") else "reference"


def _module(backend: str | None, x: Tensor):
    return _imported(MODULES[backend or default_backend(x.device.type, x.dtype)])


@functools.cache
def _imported(name: str):
    return importlib.import_module(name, __package__)


def _forward_outputs(x: Tensor, logits: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    size = (n, c, spec.output_size(h), spec.output_size(w))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    lse_size = (n, spec.groups, *logits.shape[2:]) if spec.normalizer in LSE_NORMALIZERS else (0,)
    return y, x.new_empty(lse_size, dtype=torch.promote_types(x.dtype, torch.float32))


def _backward_outputs(x: Tensor, logits: Tensor, need_dx: bool, need_dlogits: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        torch.empty_like(logits) if need_dlogits else x.new_empty(0),
    )


# Defined here by hand: what `torch.library.custom_op` wraps around an op costs more host time than everything else in a call on a GPU.
LIBRARY = torch.library.Library("carafepp", "FRAGMENT")
OPTIONS = "SymInt kernel_size, SymInt up, SymInt down, SymInt groups, str normalizer, str? backend"
SCHEMAS = (
    f"reassemble(Tensor x, Tensor logits, {OPTIONS}) -> (Tensor y, Tensor lse)",
    f"reassemble_backward(Tensor dy, Tensor x, Tensor logits, Tensor lse, {OPTIONS}, bool need_dx, bool need_dlogits) -> (Tensor, Tensor)",
)
for schema in SCHEMAS:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
_reassemble = torch.ops.carafepp.reassemble.default
_reassemble_backward = torch.ops.carafepp.reassemble_backward.default


@torch.compiler.disable
def _forward(x: Tensor, logits: Tensor, *options) -> tuple[Tensor, Tensor]:
    spec, backend = Spec(*options[:-1]), options[-1]
    y, lse = _forward_outputs(x, logits, spec)
    if y.numel():
        _module(backend, x).forward(x, logits, y, lse, spec)
    return y, lse


@torch.compiler.disable
def _backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, *options) -> tuple[Tensor, Tensor]:
    *spec, backend, need_dx, need_dlogits = options
    dx, dlogits = _backward_outputs(x, logits, need_dx, need_dlogits)
    if dy.numel():
        results = dx if need_dx else None, dlogits if need_dlogits else None
        _module(backend, x).backward(dy, x, logits, lse, *results, Spec(*spec))
    return dx, dlogits


class _Reassemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, logits, *options):
        with torch._C._AutoDispatchBelowAutograd():
            y, lse = _reassemble(x, logits, *options)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, logits, lse)
        return y, lse

    @staticmethod
    def backward(ctx, dy, _):
        x, logits, lse = ctx.saved_tensors
        *options, normalizer, backend = ctx.options
        needs = ctx.needs_input_grad[:2]
        none = (None,) * len(ctx.options)
        if dy is None:
            return None, None, *none
        if not torch.is_grad_enabled():
            dx, dlogits = _reassemble_backward(dy, x, logits, lse, *options, normalizer, backend, *needs)
        else:
            dx, dlogits = _differentiable_backward(dy, x, logits, options, normalizer, backend, needs)
        return dx if needs[0] else None, dlogits if needs[1] else None, *none


def _differentiable_backward(dy, x, logits, options, normalizer, backend, needs):
    """The same gradients from bilinear ops and elementwise ones, for a backward that is differentiated itself."""
    groups = options[-1]
    windows = logits.unflatten(1, (groups, -1))  # [N, G, K * K, up, up, Hq, Wq]
    weights = normalize(windows, normalizer)
    dx, dweights = _reassemble_backward(dy, x, weights.flatten(1, 2), x.new_empty(0), *options, "none", backend, *needs)
    if not needs[1] or normalizer == "none":
        return dx, dweights
    dweights = dweights.unflatten(1, (groups, -1))
    if normalizer == "sigmoid":
        dwindows = weights * (1 - weights) * dweights
    else:
        dwindows = weights * (dweights - (weights * dweights).sum(dim=2, keepdim=True))
    if normalizer == "sigmoid_normalized":
        dwindows = dwindows * (-windows).sigmoid()
    return dx, dwindows.flatten(1, 2)


class _ReassembleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x, weights, lse, *options):
        with torch._C._AutoDispatchBelowAutograd():
            results = _reassemble_backward(dy, x, weights, lse, *options)
        *ctx.options, ctx.need_dx, ctx.need_dlogits = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weights)
        return results

    @staticmethod
    def backward(ctx, ddx, ddweights):
        """Derivative of the bilinear maps dx = X(dy, w), dw = W(dy, x), with y = Y(x, w): only "none" gets here (_Reassemble.backward)."""
        dy, x, weights = ctx.saved_tensors
        ddx = ddx if ctx.need_dx else None
        ddweights = ddweights if ctx.need_dlogits else None
        gdy = gx = gweights = None
        lse = x.new_empty(0)
        if ddx is not None:
            gdy = _reassemble(ddx, weights, *ctx.options)[0]
            if ctx.needs_input_grad[2]:
                gweights = _reassemble_backward(dy, ddx, weights, lse, *ctx.options, False, True)[1]
        if ddweights is not None:
            y = _reassemble(x, ddweights, *ctx.options)[0]
            gdy = y if gdy is None else gdy + y
            if ctx.needs_input_grad[1]:
                gx = _reassemble_backward(dy, x, ddweights, lse, *ctx.options, True, False)[0]
        return gdy, gx, gweights, None, *(None,) * len(ctx.options), None, None


def _differentiable(function: type[torch.autograd.Function], op: torch._ops.OpOverload) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(*arguments):
        if torch.is_grad_enabled():
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return run


LIBRARY.impl("reassemble", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("reassemble", _differentiable(_Reassemble, _reassemble), "Autograd")
LIBRARY.impl("reassemble_backward", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("reassemble_backward", _differentiable(_ReassembleBackward, _reassemble_backward), "Autograd")


@torch.library.register_fake("carafepp::reassemble", lib=LIBRARY)
def _(x, logits, kernel_size, up, down, groups, normalizer, backend):
    return _forward_outputs(x, logits, Spec(kernel_size, up, down, groups, normalizer))


@torch.library.register_fake("carafepp::reassemble_backward", lib=LIBRARY)
def _(dy, x, logits, lse, kernel_size, up, down, groups, normalizer, backend, need_dx, need_dlogits):
    return _backward_outputs(x, logits, need_dx, need_dlogits)


@register_flop_formula(torch.ops.carafepp.reassemble)
def _forward_flops(x_shape, logits_shape, kernel_size, up, down, groups, normalizer, backend, *args, out_shape, **kwargs) -> int:
    n, c, h, w = x_shape
    spec = Spec(kernel_size, up, down)
    return 2 * spec.taps * n * c * spec.output_size(h) * spec.output_size(w)


@register_flop_formula(torch.ops.carafepp.reassemble_backward)
def _backward_flops(dy_shape, x_shape, logits_shape, lse_shape, kernel_size, *args, out_shape, **kwargs) -> int:
    n, c, h, w = dy_shape
    *_, need_dx, need_dlogits = args
    return 2 * kernel_size**2 * n * c * h * w * (need_dx + need_dlogits)


def _is_reference(backend: str | None, x: Tensor) -> bool:
    """Whether the definition itself is to run; raise unless `backend` is known and takes `x`."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "cpu" and x.device.type != "cpu":
        raise ValueError(f"backend 'cpu' takes CPU tensors, got x on {x.device}")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend 'triton' needs the triton package, which is not installed; 'reference' runs on any device")
    chosen = backend or default_backend(x.device.type, x.dtype)
    if chosen == "reference":
        return True
    if x.dtype not in DTYPES[chosen]:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[chosen])
        raise TypeError(f"backend {chosen!r} takes {known}, got {x.dtype}; 'reference' takes any floating-point dtype")
    return False


def _autocast(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both inputs in the dtype of an active autocast region, as a convolution would take them."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and torch.float64 not in (x.dtype, weights.dtype):
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), weights.to(dtype)
    return x, weights


def reassemble(
    x: Tensor,
    logits: Tensor,
    *,
    kernel_size: int,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    normalizer: str = "softmax",
    backend: str | None = None,
) -> Tensor:
    """Reassemble features under predicted kernels (paper, sections 3.2 and 3.3), with pixel shuffle and normalisation fused in.

    Differentiable in both inputs to any order, deterministic. Half precision is accumulated in float32. Under autocast both inputs are
    taken in the autocast dtype. The kernels multiply tiles, zeros included: an infinite or NaN feature can reach targets near its windows.

    Args:
        x: source features [N, C, H, W], float32, float16, bfloat16, or float64 (not on the Triton backend); any strides.
        logits: what the content encoder puts out, [N, groups * kernel_size**2 * up**2, ceil(H / down), ceil(W / down)], before pixel
            shuffle and normalisation; dtype and device of `x`. Channel ((g * K + ky) * K + kx) * up**2 + dy * up + dx.
        kernel_size: side of the reassembly window, odd; windows are zero outside the map and not renormalised there.
        up, down: output size is ceil(H * up / down) x ceil(W * up / down).
        groups: groups of channels that share a kernel; divides C.
        normalizer: "softmax", "sigmoid", "sigmoid_normalized" (divided by the sum over the window) or "none".
        backend: None chooses by device; "reference", "cpu" or "triton" force one.

    Returns:
        Reassembled features [N, C, ceil(H * up / down), ceil(W * up / down)] in the memory format of `x`.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value, named with what would be right.
    """
    x, logits = _autocast(x, logits) if isinstance(x, Tensor) and isinstance(logits, Tensor) else (x, logits)
    spec = Spec(kernel_size, up, down, groups, normalizer)
    check_inputs(x, logits, spec)
    if _is_reference(backend, x):
        return reassemble_reference(x, logits, **spec._asdict())
    return _reassemble(x, logits.unflatten(1, (groups * spec.taps, up, up)), *spec, backend)[0]


def reassemble_weights(
    x: Tensor,
    weights: Tensor,
    *,
    kernel_size: int,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Reassemble features under weights that are already normalised and at output resolution (the layout of mmcv's operator).

    Args:
        x: source features [N, C, H, W].
        weights: [N, groups * kernel_size**2, ceil(H * up / down), ceil(W * up / down)], channel (g * K + ky) * K + kx. Read in place;
            only a rational scale whose output is not a multiple of `up` pads it to the next multiple first.
        kernel_size, up, down, groups, backend: as for `reassemble`.

    Returns:
        Reassembled features [N, C, ceil(H * up / down), ceil(W * up / down)] in the memory format of `x`.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value, named with what would be right.
    """
    x, weights = _autocast(x, weights) if isinstance(x, Tensor) and isinstance(weights, Tensor) else (x, weights)
    spec = Spec(kernel_size, up, down, groups, "none")
    check_inputs(x, weights, spec, name="weights")
    if _is_reference(backend, x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = weighted_sum(x.to(dtype), weights.to(dtype).unflatten(1, (groups, spec.taps)), spec)
        return y.to(x.dtype).contiguous(memory_format=memory_format(x))
    rows, columns = spec.cells(x.shape[2]), spec.cells(x.shape[3])
    ragged = rows * up - weights.shape[2], columns * up - weights.shape[3]
    if any(ragged):
        weights = F.pad(weights, (0, ragged[1], 0, ragged[0]))
    cells = weights.unflatten(3, (columns, up)).unflatten(2, (rows, up))  # [N, G * K * K, Hq, up, Wq, up]
    return _reassemble(x, cells.permute(0, 1, 3, 5, 2, 4), *spec, backend)[0]
