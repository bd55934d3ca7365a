"""The public functions: `reassemble` and `reassemble_weights`."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .backends import choose_backend
from .borders import mask_outside
from .decomposed import decompose
from .execution import Layouts, Options, find_layouts
from .flops import register_formulas
from .geometry import Spec, check_inputs, is_traced, memory_format
from .observers import is_observed
from .reference import normalize, reassemble_reference, weighted_sum
from .registration import reassemble_op, reassemble_unobserved

register_formulas()


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to the dtype of an active autocast region, as a convolution does; what is not a floating-point tensor stays as it is."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    first = tensors[0]
    if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    if all([isinstance(tensor, Tensor) and tensor.dtype == dtype for tensor in tensors]):
        return tensors
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64 for tensor in tensors):
        return tensors
    return tuple([tensor.to(dtype) for tensor in tensors])


def _trace(x: Tensor, weights: Tensor, spec: Spec, size: Sequence[int] | None, *, name: str) -> Tensor:
    """Let TorchScript's tracer see plain operators, since the op takes sizes in a form that it refuses.

    The traced program, or the ONNX file of the exporter that is based on it, takes other sizes and needs no carafepp.
    """
    with warnings.catch_warnings():
        # the checks hold for the sizes of the example
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # pyright: ignore[reportPrivateImportUsage]
        given = check_inputs(x, weights, spec, size, name=name)
        return decompose(x, weights, None if size is None else given, *spec, name == "weights", None)[0]


def _check_call(
    x: Tensor, weights: Tensor, spec: Spec, size: Sequence[int] | None, backend: str | None, name: str, device: torch.device | None = None
) -> Options | None:
    """Check all arguments of a call on a device, that of `x` unless it is given.

    Returns:
        The options of the op, or None if the definition runs instead.
    """
    rows, columns = check_inputs(x, weights, spec, size, name=name)
    if name == "weights" and size is not None and (rows > spec.output_size(x.shape[2]) or columns > spec.output_size(x.shape[3])):
        raise ValueError(f"size must not exceed the output size of the scale for weights at output resolution, got {rows} x {columns}")
    if choose_backend(backend, device or x.device, x.dtype) == "reference":
        return None
    return Options((rows, columns), *spec, name == "weights", backend)


# as many as `find_layouts` remembers
@functools.lru_cache(maxsize=16384)
def check_layouts(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    weights_shape: torch.Size,
    spec: Spec,
    size: tuple[int, int] | None,
    backend: str | None,
    name: str,
) -> Layouts | None:
    """Check a call once for dense tensors of these layouts, because they come back in every iteration."""
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    options = _check_call(x, torch.empty(weights_shape, dtype=dtype, device="meta"), spec, size, backend, name, device)
    return options and find_layouts(shape, strides, options)


def is_plain_size(size: Sequence[int] | None) -> TypeGuard[tuple[int, int] | None]:
    """Return whether a size has the type of a right one, so that it is equal only to sizes that are as right or as wrong."""
    return size is None or (isinstance(size, tuple) and all([type(side) is int for side in size]))


def _can_be_remembered(spec: Spec, size: Sequence[int] | None, backend: str | None) -> bool:
    """Return whether options have the types of right ones, as `is_plain_size` does for the size."""
    if tuple(map(type, spec)) != (int, int, int, int, str, str) or not (backend is None or type(backend) is str):
        return False
    return is_plain_size(size)


def _call(x: Tensor, weights: Tensor, spec: Spec, size: Sequence[int] | None, backend: str | None, name: str) -> Tensor | None:
    """Check a call and run it, unless the definition runs instead."""
    if not is_observed(x, weights) and _can_be_remembered(spec, size, backend):
        dtype, device = x.dtype, x.device
        # tensors of other dtypes, such as quantised ones, need not exist on the device "meta"
        if weights.dtype == dtype and weights.device == device and dtype.is_floating_point:
            layouts = check_layouts(x.shape, x.stride(), dtype, device, weights.shape, spec, size, backend, name)
            return layouts and reassemble_unobserved(x, weights, layouts)
    options = _check_call(x, weights, spec, size, backend, name)
    return options and reassemble_op(x, weights, *options)[0]


def _define_with_weights(x: Tensor, weights: Tensor, spec: Spec) -> Tensor:
    """Compute `reassemble_weights` by the definition."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    windows = weights.to(dtype).unflatten(1, (spec.groups, spec.taps))
    if spec.border == "renormalize":
        windows = mask_outside(windows, spec, *x.shape[2:])
    y = weighted_sum(x.to(dtype), normalize(windows, spec.normalizer), spec)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


def reassemble(
    x: Tensor,
    logits: Tensor,
    *,
    kernel_size: int,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    normalizer: str = "softmax",
    border: str = "zero",
    size: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Reassemble features: each output pixel is the sum of a window of `x`, weighted by a predicted kernel (paper, sections 3.2 and 3.3).

    The operator itself applies the pixel shuffle and the normalisation to the logits. It is deterministic and differentiable to any order
    in both inputs. It accumulates half precision in float32. Autocast casts both inputs to its dtype.

    The kernels have two limits. GPU and CPU kernels multiply whole tiles, including zero weights, so that an infinite or NaN feature can
    reach targets near the windows that contain it. On a GPU, an infinite or NaN logit can do the same. The GPU kernels, and the CPU kernel
    in its backward pass, compute the weights from a saved log-sum-exp. Their relative error therefore grows with the largest logit l, to
    about 1e-7 * |l| in float32.

    Args:
        x: source features [N, C, H, W], float32, float16, bfloat16, or float64 (not on the Triton backend); any strides.
        logits: the output of the content encoder, [N, groups * kernel_size**2 * up**2, ceil(H / down), ceil(W / down)], before pixel
            shuffle and normalisation; dtype and device of `x`. The channel of tap (ky, kx) and sub-pixel (dy, dx) is ((g * K + ky) * K +
            kx) * up**2 + dy * up + dx.
        kernel_size: side of the reassembly window, odd.
        up, down: output size is ceil(H * up / down) x ceil(W * up / down).
        groups: groups of channels that share a kernel; divides C.
        normalizer: "softmax", "sigmoid", "sigmoid_normalized" (divided by the sum over the window) or "none".
        border: how taps outside the map are treated. "zero": they read zeros, and the other weights do not change. "renormalize": they are
            omitted, and the normaliser runs over the taps inside the map; only with "softmax" and "sigmoid_normalized". "replicate": they
            read the nearest pixel of the map. "shift": the whole window moves into the map, which needs at least K rows and columns.
        size: rows and columns of the output. Each may differ by less than `up` from the output size above, as in a pyramid whose finer
            level has an odd side. A shorter output is cut at the bottom and right; a longer one repeats its last row or column.
        backend: the implementation. None chooses by device: "triton" on a GPU, "cpu" (compiled at first use) on a CPU, and "torch" on a CPU
            without a compiler. "torch" is a loop of PyTorch calls over the taps, and "reference" is the definition; both run on any device.

    Returns:
        Reassembled features [N, C, *size] in the memory format of `x`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value; the message names it and says what would be right.
        RuntimeError: `backend` is "cpu", and the kernel cannot be compiled; the message says what to install.
    """
    if has_torch_function_variadic(x, logits):
        # tensor subclasses, modes and the proxies of torch.fx take the call as one of a function of PyTorch
        options: dict[str, Any] = dict(
            kernel_size=kernel_size, up=up, down=down, groups=groups, normalizer=normalizer, border=border, size=size, backend=backend
        )
        return handle_torch_function(reassemble, (x, logits), x, logits, **options)
    x, logits = autocast(x, logits)
    spec = Spec(kernel_size, up, down, groups, normalizer, border)
    if is_traced():
        return _trace(x, logits, spec, size, name="logits")
    y = _call(x, logits, spec, size, backend, "logits")
    return reassemble_reference(x, logits, **spec._asdict(), size=size) if y is None else y


def reassemble_padded(x: Tensor, logits: Tensor, spec: Spec, size: Sequence[int] | None = None) -> Tensor:
    """Reassemble as `reassemble` does, with logits that have further channels at the end: they are not read, and their gradients are 0.

    Arguments, result and errors are otherwise those of `reassemble`, except that autocast casts nothing.
    """
    y = _call(x, logits, spec, size, None, "padded logits")
    used = spec.groups * spec.taps * spec.up**2
    return reassemble_reference(x, logits[:, :used], **spec._asdict(), size=size) if y is None else y


def reassemble_weights(
    x: Tensor,
    weights: Tensor,
    *,
    kernel_size: int,
    up: int = 1,
    down: int = 1,
    groups: int = 1,
    normalizer: str = "none",
    border: str = "zero",
    size: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Reassemble features with weights at output resolution (the layout of mmcv's operator).

    Args:
        x: source features [N, C, H, W].
        weights: [N, groups * kernel_size**2, Ho, Wo], where Ho x Wo is the output size. The channel of tap (ky, kx) is (g * K + ky) * K
            + kx. They are read in place, unless the output size is not a multiple of `up`; they are then first padded to the next multiple.
        kernel_size, up, down, groups, border, backend: as for `reassemble`.
        normalizer: "none" for weights that are already normalised; with another name, as for `reassemble`, `weights` are logits.
        size: rows and columns Ho, Wo of the output, each less than `up` shorter than ceil(H * up / down), ceil(W * up / down) or equal.

    Returns:
        Reassembled features [N, C, Ho, Wo] in the memory format of `x`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `reassemble`.
    """
    if has_torch_function_variadic(x, weights):
        options: dict[str, Any] = dict(
            kernel_size=kernel_size, up=up, down=down, groups=groups, normalizer=normalizer, border=border, size=size, backend=backend
        )
        return handle_torch_function(reassemble_weights, (x, weights), x, weights, **options)
    x, weights = autocast(x, weights)
    spec = Spec(kernel_size, up, down, groups, normalizer, border)
    if is_traced():
        return _trace(x, weights, spec, size, name="weights")
    y = _call(x, weights, spec, size, backend, "weights")
    return _define_with_weights(x, weights, spec) if y is None else y
