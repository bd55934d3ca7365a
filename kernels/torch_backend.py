"""The operator in plain PyTorch, on any device: one fused multiply-add per tap over shifted views, without an unfolded copy.

It runs on a CPU without a compiler for the CPU kernel.
"""

from collections.abc import Iterator
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import LSE_NORMALIZERS, Spec
from .reference import normalize, normalize_backward

Index = tuple[EllipsisType, slice, slice]


def _axis(size: int, cells: int, output: int, offset: int, sub: int, spec: Spec) -> tuple[slice, slice]:
    """Find the cells whose sub-row `sub` has a source row inside [0, size) at `offset` from the centre of its window, and those rows."""
    shift = sub * spec.down // spec.up + offset
    first = max(0, -(shift // spec.down)) if shift < 0 else 0
    outputs = max(0, -(-(output - sub) // spec.up))
    last = min(cells, outputs, (size - 1 - shift) // spec.down + 1)
    last = max(first, last)
    start = first * spec.down + shift
    return slice(first, last), slice(start, start + max(0, last - first - 1) * spec.down + (last > first), spec.down)


def _subpixels(spec: Spec) -> Iterator[tuple[int, int]]:
    """Yield the sub-pixels (dy, dx) of a cell."""
    return ((dy, dx) for dy in range(spec.up) for dx in range(spec.up))


def _visits(x: Tensor, logits: Tensor, y: Tensor, dy: int, dx: int, spec: Spec) -> Iterator[tuple[int, Index, Index]]:
    """Yield (tap, cells, sources) for every weight of a sub-pixel: the cells that use it and the sources that they read."""
    radius = spec.kernel_size // 2
    for tap in range(spec.taps):
        ky, kx = divmod(tap, spec.kernel_size)
        qi, i = _axis(x.shape[2], logits.shape[4], y.shape[2], ky - radius, dy, spec)
        qj, j = _axis(x.shape[3], logits.shape[5], y.shape[3], kx - radius, dx, spec)
        if qi.stop > qi.start and qj.stop > qj.start:
            yield tap, (..., qi, qj), (..., i, j)


def _scores(logits: Tensor, spec: Spec) -> Tensor:
    windows = logits.unflatten(1, (spec.groups, spec.taps))
    windows = windows.to(torch.promote_types(logits.dtype, torch.float32))
    return F.logsigmoid(windows) if spec.normalizer == "sigmoid_normalized" else windows


def _weights(logits: Tensor, spec: Spec) -> Tensor:
    scores = _scores(logits, spec)
    return scores.softmax(2) if spec.normalizer in LSE_NORMALIZERS else normalize(scores, spec.normalizer)


def forward(x: Tensor, logits: Tensor, y: Tensor, lse: Tensor, spec: Spec) -> None:
    """Fill y [N, C, Ho, Wo] and lse [N, G, up, up, Hq, Wq] from x and logits [N, G * K * K, up, up, Hq, Wq]."""
    if lse.numel():
        torch.logsumexp(_scores(logits, spec), dim=2, out=lse)
    weights = _weights(logits, spec)
    source = x.unflatten(1, (spec.groups, -1))
    # the sums of a sub-pixel are contiguous: adding to its strided view of y takes twice the time
    total = weights.new_empty(*source.shape[:3], *logits.shape[4:])  # [N, G, C / G, Hq, Wq]
    for dy, dx in _subpixels(spec):
        total.zero_()
        for tap, cells, sources in _visits(x, logits, y, dy, dx, spec):
            total[cells].addcmul_(weights[:, :, tap, None, dy, dx][cells], source[sources].to(total.dtype))
        place = y[..., dy :: spec.up, dx :: spec.up]
        place.copy_(total.flatten(1, 2)[..., : place.shape[2], : place.shape[3]])


def backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, dx: Tensor | None, dlogits: Tensor | None, spec: Spec) -> None:
    """Fill dx and dlogits, except those that are None. The weights are computed again, because the log-sum-exp has rounding errors."""
    weights = _weights(logits, spec)
    source = x.unflatten(1, (spec.groups, -1))
    dsource = None
    if dx is not None:
        dsource = (dx.zero_() if dx.dtype == weights.dtype else torch.zeros_like(x, dtype=weights.dtype)).unflatten(1, (spec.groups, -1))
    dweights = torch.zeros_like(weights) if dlogits is not None else None
    for row, column in _subpixels(spec):
        gradient = dy[..., row :: spec.up, column :: spec.up].unflatten(1, (spec.groups, -1)).to(weights.dtype).contiguous()
        for tap, cells, sources in _visits(x, logits, dy, row, column, spec):
            g = gradient[cells]
            if dsource is not None:
                dsource[sources].addcmul_(weights[:, :, tap, None, row, column][cells], g)
            if dweights is not None:
                dweights[:, :, tap, row, column][cells] = (g * source[sources].to(weights.dtype)).sum(2)
    if dx is not None and dsource is not None and dx.dtype != weights.dtype:
        dx.copy_(dsource.flatten(1, 2))
    if dlogits is not None and dweights is not None:
        windows = logits.unflatten(1, (spec.groups, spec.taps)).to(weights.dtype)
        dlogits.copy_(normalize_backward(dweights, weights, windows, spec.normalizer).flatten(1, 2))
