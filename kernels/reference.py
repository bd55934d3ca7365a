"""The definition of CARAFE++. Read this module first; every backend is tested against it.

N batch, C channels, G groups, K kernel size, H, W source size, Ho, Wo output size, [Hq, Wq] cells (see geometry.py).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .borders import mask_outside
from .geometry import Spec, check_inputs, memory_format


def normalize(logits: Tensor, normalizer: str) -> Tensor:
    """Normalise `logits` [N, G, K * K, ...] over the window (paper, section 3.2 and Table XIV)."""
    if normalizer == "softmax":
        return logits.softmax(dim=2)
    if normalizer == "sigmoid":
        return logits.sigmoid()
    if normalizer == "sigmoid_normalized":
        # sigmoid(l) / sum(sigmoid(l)), without 0 / 0 where every sigmoid of a window underflows
        return F.logsigmoid(logits).softmax(dim=2)
    return logits


def normalize_backward(dweights: Tensor, weights: Tensor, logits: Tensor, normalizer: str) -> Tensor:
    """Compute the gradient of the logits from that of `weights` = normalize(logits, normalizer); every tensor is [N, G, K * K, ...].

    Backends that compute the gradient of the weights use this function; autograd differentiates the definition itself.
    """
    if normalizer == "none":
        return dweights
    if normalizer == "sigmoid":
        return weights * (1 - weights) * dweights
    dscores = weights * (dweights - (weights * dweights).sum(dim=2, keepdim=True))
    # "sigmoid_normalized" is the softmax of logsigmoid, whose derivative is sigmoid(-l)
    return dscores * (-logits).sigmoid() if normalizer == "sigmoid_normalized" else dscores


def normalize_forward(dlogits: Tensor, weights: Tensor, logits: Tensor, normalizer: str) -> Tensor:
    """Compute the tangent of `weights` = normalize(logits, normalizer) from that of the logits; every tensor is [N, G, K * K, ...]."""
    if normalizer == "none":
        return dlogits
    if normalizer == "sigmoid":
        return weights * (1 - weights) * dlogits
    # "sigmoid_normalized" is the softmax of logsigmoid, whose derivative is sigmoid(-l)
    dscores = dlogits * (-logits).sigmoid() if normalizer == "sigmoid_normalized" else dlogits
    return weights * (dscores - (weights * dscores).sum(dim=2, keepdim=True))


def reassembly_kernels(logits: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    """Turn logits [N, G * K * K * up**2, Hq, Wq] of a source `height` x `width` into normalised kernels [N, G, K * K, Ho, Wo]."""
    # pixel shuffle, whose own backward refuses an empty batch
    cells = logits.unflatten(1, (spec.groups * spec.taps, spec.up, spec.up)).permute(0, 1, 4, 2, 5, 3)  # [N, G * K * K, Hq, up, Wq, up]
    logits = cells.flatten(4, 5).flatten(2, 3)  # [N, G * K * K, Hq * up, Wq * up]
    logits = logits[..., : spec.output_size(height), : spec.output_size(width)]  # a rational scale may cut the last cell
    windows = logits.unflatten(1, (spec.groups, spec.taps))
    if spec.border == "renormalize":
        windows = mask_outside(windows, spec, height, width)
    return normalize(windows, spec.normalizer)


def weighted_sum(x: Tensor, kernels: Tensor, spec: Spec) -> Tensor:
    """Sum the windows of `x` [N, C, H, W], weighted by `kernels` [N, G, K * K, Ho, Wo], to [N, C, Ho, Wo] (Eqn. 3)."""
    n, c, *size = x.shape
    height, width = kernels.shape[-2:]
    radius = spec.kernel_size // 2
    # beyond the map, windows read zeros, unless `_window_positions` keeps them inside
    source = F.pad(x, (radius,) * 4).unflatten(1, (spec.groups, c // spec.groups))
    rows, columns = (_window_positions(*sides, spec, x.device) + radius for sides in zip((height, width), size, strict=True))
    y = x.new_zeros(n, spec.groups, c // spec.groups, height, width)
    for tap in range(spec.taps):
        ky, kx = divmod(tap, spec.kernel_size)
        y = y + kernels[:, :, tap, None] * source[..., rows[ky][:, None], columns[kx]]
    return y.flatten(1, 2)


def _window_positions(count: int, size: int, spec: Spec, device: torch.device) -> Tensor:
    """Return the source rows (columns) that the windows of `count` output rows (columns) read in a map of `size`, [K, count]."""
    first = torch.arange(count, device=device) * spec.down // spec.up - spec.kernel_size // 2
    if spec.border == "shift":
        first = first.clamp(0, size - spec.kernel_size)
    positions = torch.arange(spec.kernel_size, device=device)[:, None] + first
    return positions.clamp(0, size - 1) if spec.border == "replicate" else positions


def reassemble_reference(
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
) -> Tensor:
    """Define `reassemble` in plain PyTorch, for any device and any floating-point dtype; half precision is accumulated in float32.

    Args:
        x: source features [N, C, H, W].
        logits: the output of the content encoder, [N, groups * kernel_size**2 * up**2, ceil(H / down), ceil(W / down)], before pixel
            shuffle and normalisation. The channel of tap (ky, kx) and sub-pixel (dy, dx) is ((g * K + ky) * K + kx) * up**2 + dy * up + dx.
        kernel_size: side of the reassembly window, odd.
        up, down: output size is ceil(H * up / down) x ceil(W * up / down).
        groups: groups of channels that share a kernel.
        normalizer: "softmax", "sigmoid", "sigmoid_normalized" (divided by the sum over the window) or "none".
        border: what the taps of a window outside the map do. "zero": they read zeros, and the other weights stay. "renormalize": they are
            left out, and the normaliser runs over the taps inside the map; only with "softmax" and "sigmoid_normalized". "replicate": they
            read the nearest pixel of the map. "shift": the whole window moves into the map, which needs at least K rows and columns.
        size: rows and columns of the output; each may differ by less than `up` from ceil(H * up / down), ceil(W * up / down). A shorter
            output is cut at the bottom and right; a longer one repeats its last row or column.

    Returns:
        Reassembled features [N, C, *size] in the memory format of `x`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value; the message names it and says what would be right.
    """
    spec = Spec(kernel_size, up, down, groups, normalizer, border)
    rows, columns = check_inputs(x, logits, spec, size)
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernels = reassembly_kernels(logits.to(dtype), spec, *x.shape[2:])
    y = weighted_sum(x.to(dtype), kernels, spec)
    if size is not None:
        # the index of the last row or column repeats where the output is longer
        i, j = (torch.arange(side, device=x.device).clamp(max=last - 1) for side, last in zip((rows, columns), y.shape[2:], strict=True))
        y = y[..., i[:, None], j]
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))
