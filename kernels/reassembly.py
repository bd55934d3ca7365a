"""The public functions: `reassemble` and `reassemble_weights`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import choose_backend
from .flops import register_formulas
from .geometry import Spec, check_inputs, memory_format
from .reference import reassemble_reference, weighted_sum
from .registration import reassemble_op

register_formulas()


def _autocast(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both inputs to the dtype of an active autocast region, as a convolution does."""
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
    """Reassemble features with predicted kernels (paper, sections 3.2 and 3.3), with pixel shuffle and normalisation fused in.

    The operator is deterministic and differentiable to any order in both inputs. It accumulates half precision in float32. Autocast casts
    both inputs to its dtype. GPU and CPU kernels multiply whole tiles, including zero weights, so that an infinite or NaN feature can reach
    targets near the windows that contain it; on a GPU, so can an infinite or NaN logit.

    Args:
        x: source features [N, C, H, W], float32, float16, bfloat16, or float64 (not on the Triton backend); any strides.
        logits: the output of the content encoder, [N, groups * kernel_size**2 * up**2, ceil(H / down), ceil(W / down)], before pixel
            shuffle and normalisation; dtype and device of `x`. The channel of tap (ky, kx) and sub-pixel (dy, dx) is ((g * K + ky) * K +
            kx) * up**2 + dy * up + dx.
        kernel_size: side of the reassembly window, odd; windows are zero outside the map and not renormalised there.
        up, down: output size is ceil(H * up / down) x ceil(W * up / down).
        groups: groups of channels that share a kernel; divides C.
        normalizer: "softmax", "sigmoid", "sigmoid_normalized" (divided by the sum over the window) or "none".
        backend: None chooses by device: "triton" on a GPU, "cpu" (compiled at first use) on a CPU. A name forces a backend: "reference" is
            the definition, and "torch" a loop of PyTorch calls over the taps, on any device. None also runs "torch" on a CPU without a
            compiler.

    Returns:
        Reassembled features [N, C, ceil(H * up / down), ceil(W * up / down)] in the memory format of `x`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value; the message names it and says what would be right.
        RuntimeError: `backend` is "cpu", and the kernel cannot be compiled; the message says what to install.
    """
    x, logits = _autocast(x, logits) if isinstance(x, Tensor) and isinstance(logits, Tensor) else (x, logits)
    spec = Spec(kernel_size, up, down, groups, normalizer)
    check_inputs(x, logits, spec)
    if choose_backend(backend, x) == "reference":
        return reassemble_reference(x, logits, **spec._asdict())
    return reassemble_op(x, logits.unflatten(1, (groups * spec.taps, up, up)), *spec, backend)[0]


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
    """Reassemble features with weights that are already normalised and at output resolution (the layout of mmcv's operator).

    Args:
        x: source features [N, C, H, W].
        weights: [N, groups * kernel_size**2, ceil(H * up / down), ceil(W * up / down)], channel (g * K + ky) * K + kx. They are read in
            place, except where the output size is not a multiple of `up` (rational scales): there they are first padded to the next
            multiple.
        kernel_size, up, down, groups, backend: as for `reassemble`.

    Returns:
        Reassembled features [N, C, ceil(H * up / down), ceil(W * up / down)] in the memory format of `x`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `reassemble`.
    """
    x, weights = _autocast(x, weights) if isinstance(x, Tensor) and isinstance(weights, Tensor) else (x, weights)
    spec = Spec(kernel_size, up, down, groups, "none")
    check_inputs(x, weights, spec, name="weights")
    if choose_backend(backend, x) == "reference":
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = weighted_sum(x.to(dtype), weights.to(dtype).unflatten(1, (groups, spec.taps)), spec)
        return y.to(x.dtype).contiguous(memory_format=memory_format(x))
    rows, columns = spec.cells(x.shape[2]), spec.cells(x.shape[3])
    missing_rows, missing_columns = rows * up - weights.shape[2], columns * up - weights.shape[3]
    if missing_rows or missing_columns:
        weights = F.pad(weights, (0, missing_columns, 0, missing_rows))
    cells = weights.unflatten(3, (columns, up)).unflatten(2, (rows, up))  # [N, G * K * K, Hq, up, Wq, up]
    return reassemble_op(x, cells.permute(0, 1, 3, 5, 2, 4), *spec, backend)[0]
