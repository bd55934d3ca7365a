"""The operator in plain PyTorch, on any device: one fused multiply-add per tap over shifted views, without an unfolded copy.

The borders "replicate" and "shift" take a padded copy of the source.
It runs on a CPU without a compiler for the CPU kernel.
"""

from collections.abc import Iterator
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor

from .borders import arrange_windows, fold_padding, pad_source, restore_windows
from .geometry import LSE_NORMALIZERS, PADDED_BORDERS, Spec
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


def _visits(source: Tensor, logits: Tensor, y: Tensor, dy: int, dx: int, spec: Spec) -> Iterator[tuple[int, Index, Index]]:
    """Yield (tap, cells, sources) for every weight of a sub-pixel: the cells that use it and the sources that they read."""
    # place of the map in the source
    lead = spec.kernel_size // 2 if spec.border in PADDED_BORDERS else 0
    for tap in range(spec.taps):
        ky, kx = (offset - spec.kernel_size // 2 + lead for offset in divmod(tap, spec.kernel_size))
        qi, i = _axis(source.shape[-2], logits.shape[4], y.shape[2], ky, dy, spec)
        qj, j = _axis(source.shape[-1], logits.shape[5], y.shape[3], kx, dx, spec)
        if qi.stop > qi.start and qj.stop > qj.start:
            yield tap, (..., qi, qj), (..., i, j)


def _windows(x: Tensor, logits: Tensor, spec: Spec) -> Tensor:
    windows = logits.unflatten(1, (spec.groups, spec.taps))
    return arrange_windows(windows.to(torch.promote_types(logits.dtype, torch.float32)), spec, *x.shape[2:])


def forward(x: Tensor, logits: Tensor, y: Tensor, lse: Tensor | None, spec: Spec) -> None:
    """Fill y [N, C, Ho, Wo] and, unless it is None, lse [N, G, up, up, Hq, Wq] from x and logits [N, G * K * K, up, up, Hq, Wq]."""
    windows = _windows(x, logits, spec)
    if lse is not None and spec.normalizer in LSE_NORMALIZERS:
        torch.logsumexp(F.logsigmoid(windows) if spec.normalizer == "sigmoid_normalized" else windows, dim=2, out=lse)
    weights = normalize(windows, spec.normalizer)
    source = pad_source(x, spec).unflatten(1, (spec.groups, -1))
    # the sums of a sub-pixel are contiguous: adding to its strided view of y takes twice the time
    total = weights.new_empty(*source.shape[:3], *logits.shape[4:])  # [N, G, C / G, Hq, Wq]
    for dy, dx in _subpixels(spec):
        total.zero_()
        for tap, cells, sources in _visits(source, logits, y, dy, dx, spec):
            total[cells].addcmul_(weights[:, :, tap, None, dy, dx][cells], source[sources].to(total.dtype))
        place = y[..., dy :: spec.up, dx :: spec.up]
        place.copy_(total.flatten(1, 2)[..., : place.shape[2], : place.shape[3]])


def backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, dx: Tensor | None, dlogits: Tensor | None, spec: Spec) -> None:
    """Fill dx and dlogits, except those that are None. The weights are computed again, because the log-sum-exp has rounding errors."""
    windows = _windows(x, logits, spec)
    weights = normalize(windows, spec.normalizer)
    padded = pad_source(x, spec)
    source = padded.unflatten(1, (spec.groups, -1))
    dpadded = dsource = None
    if dx is not None:
        in_place = dx.dtype == weights.dtype and dx.shape == padded.shape
        dpadded = dx.zero_() if in_place else torch.zeros_like(padded, dtype=weights.dtype)
        dsource = dpadded.unflatten(1, (spec.groups, -1))
    dweights = torch.zeros_like(weights) if dlogits is not None else None
    for row, column in _subpixels(spec):
        gradient = dy[..., row :: spec.up, column :: spec.up].unflatten(1, (spec.groups, -1)).to(weights.dtype).contiguous()
        for tap, cells, sources in _visits(source, logits, dy, row, column, spec):
            g = gradient[cells]
            if dsource is not None:
                dsource[sources].addcmul_(weights[:, :, tap, None, row, column][cells], g)
            if dweights is not None:
                dweights[:, :, tap, row, column][cells] = (g * source[sources].to(weights.dtype)).sum(2)
    if dx is not None and dpadded is not None and dpadded is not dx:
        dx.copy_(fold_padding(dpadded, spec))
    if dlogits is not None and dweights is not None:
        dwindows = normalize_backward(dweights, weights, windows, spec.normalizer)
        dlogits.copy_(restore_windows(dwindows, spec, *x.shape[2:]).flatten(1, 2))
