"""The operator on CPU: one fused multiply-add per tap over shifted views, no unfolded copy."""

import torch
from torch import Tensor

from .geometry import Spec
from .reference import normalize


def _axis(size: int, cells: int, offset: int, sub: int, spec: Spec) -> tuple[slice, slice]:
    """Cells whose sub-row `sub` sees source row q * down + offset inside [0, size), and those source rows."""
    shift = sub * spec.down // spec.up + offset
    first = max(0, -(shift // spec.down)) if shift < 0 else 0
    outputs = max(0, -(-(spec.output_size(size) - sub) // spec.up))
    last = min(cells, outputs, (size - 1 - shift) // spec.down + 1)
    last = max(first, last)
    start = first * spec.down + shift
    return slice(first, last), slice(start, start + max(0, last - first - 1) * spec.down + (last > first), spec.down)


def _visits(x: Tensor, logits: Tensor, spec: Spec):
    """Yield (tap, dy, dx, cells, sources) for every weight of a cell: where it applies and what it reads."""
    radius = spec.kernel_size // 2
    for dy in range(spec.up):
        for dx in range(spec.up):
            for tap in range(spec.taps):
                ky, kx = divmod(tap, spec.kernel_size)
                qi, i = _axis(x.shape[2], logits.shape[4], ky - radius, dy, spec)
                qj, j = _axis(x.shape[3], logits.shape[5], kx - radius, dx, spec)
                if qi.stop > qi.start and qj.stop > qj.start:
                    yield tap, dy, dx, (..., qi, qj), (..., i, j)


def _scores(logits: Tensor, spec: Spec) -> Tensor:
    windows = logits.unflatten(1, (spec.groups, spec.taps))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    windows = windows.to(dtype)
    return torch.nn.functional.logsigmoid(windows) if spec.normalizer == "sigmoid_normalized" else windows


def forward(x: Tensor, logits: Tensor, y: Tensor, lse: Tensor, spec: Spec) -> None:
    """Fill y [N, C, Ho, Wo] and lse [N, G, up, up, Hq, Wq] from x and logits [N, G * K * K, up, up, Hq, Wq]."""
    scores = _scores(logits, spec)
    if lse.numel():
        torch.logsumexp(scores, dim=2, out=lse)
        weights = (scores - lse[:, :, None]).exp_()
    else:
        weights = normalize(scores, spec.normalizer)
    source = x.unflatten(1, (spec.groups, -1))
    total = y if y.dtype == weights.dtype else torch.empty_like(y, dtype=weights.dtype)
    total.zero_()
    grouped = total.unflatten(1, (spec.groups, -1))
    for tap, dy, dx, cells, sources in _visits(x, logits, spec):
        grouped[..., dy :: spec.up, dx :: spec.up][cells].addcmul_(weights[:, :, tap, None, dy, dx][cells], source[sources].to(total.dtype))
    if total is not y:
        y.copy_(total)


def backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, dx: Tensor | None, dlogits: Tensor | None, spec: Spec) -> None:
    """Fill those of dx and dlogits that are asked for."""
    scores = _scores(logits, spec)
    weights = (scores - lse[:, :, None]).exp_() if lse.numel() else normalize(scores, spec.normalizer)
    source = x.unflatten(1, (spec.groups, -1))
    gradient = dy.unflatten(1, (spec.groups, -1))
    dsource = torch.zeros_like(source, dtype=weights.dtype) if dx is not None else None
    dweights = torch.zeros_like(weights) if dlogits is not None else None
    for tap, sub, col, cells, sources in _visits(x, logits, spec):
        g = gradient[..., sub :: spec.up, col :: spec.up][cells].to(weights.dtype)
        if dsource is not None:
            dsource[sources].addcmul_(weights[:, :, tap, None, sub, col][cells], g)
        if dweights is not None:
            dweights[:, :, tap, sub, col][cells] = (g * source[sources].to(weights.dtype)).sum(2)
    if dx is not None:
        dx.copy_(dsource.flatten(1, 2))
    if dlogits is not None:
        if spec.normalizer == "sigmoid":
            dweights *= weights * (1 - weights)
        elif spec.normalizer != "none":
            dweights = weights * (dweights - (weights * dweights).sum(2, keepdim=True))
            if spec.normalizer == "sigmoid_normalized":
                dweights *= (-logits.unflatten(1, (spec.groups, spec.taps)).to(weights.dtype)).sigmoid()
        dlogits.copy_(dweights.flatten(1, 2))
