"""The borders of a map in plain PyTorch: which taps lie outside, padded sources, and windows that move into the map.

Every border is that of a padded map. "zero" and "renormalize" pad with zeros, "replicate" with the nearest pixel. With "shift", a window of
K taps that would leave the map moves inside. It then covers, besides the pixels that it covered before, those K pixels further on from the
places outside: the pixel of place p is p + K before the map, and p - K behind it. "shift" is therefore a padding as well, after the taps of
each moved window are rotated so that every tap is at the place that it had before the move.

Windows are [N, G, K * K, up, up, Hq, Wq] in cells, or [N, G, K * K, Ho, Wo] at output resolution.
"""

import torch
from torch import Tensor

from .geometry import PADDED_BORDERS, Spec


def _targets(windows: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Return the output row and the output column of every window; together they broadcast to the axes of `windows` after the taps."""
    rows, columns = (torch.arange(side, device=windows.device) for side in windows.shape[-2:])
    if windows.dim() == 5:
        return rows[:, None], columns[None]
    subs = torch.arange(spec.up, device=windows.device)[:, None]
    return (rows * spec.up + subs)[:, None, :, None], (columns * spec.up + subs)[None, :, None]


def mask_outside(windows: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    """Set the logits of the taps outside a source of `height` x `width` to minus infinity, which gives them the weight 0.

    Windows that a rational scale cuts off, whose centres are outside, stay as they are.
    """

    def is_outside(targets: Tensor, size: int) -> Tensor:
        centres = targets * spec.down // spec.up
        taps = torch.arange(spec.kernel_size, device=targets.device).view(-1, *[1] * targets.dim())
        positions = centres - spec.kernel_size // 2 + taps
        return (centres < size) & ((positions < 0) | (positions >= size))  # [K, ...]

    rows, columns = _targets(windows, spec)
    outside = is_outside(rows, height)[:, None] | is_outside(columns, width)
    return windows.masked_fill(outside.flatten(0, 1), -torch.inf)


def arrange_windows(windows: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    """Turn logits or weights into those of windows that read a source of `height` x `width` as `pad_source` pads it."""
    if spec.border == "renormalize":
        return mask_outside(windows, spec, height, width)
    return _rotate(windows, spec, height, width, 1) if spec.border == "shift" else windows


def restore_windows(windows: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    """Give gradients to the result of `arrange_windows` the order of its argument."""
    return _rotate(windows, spec, height, width, -1) if spec.border == "shift" else windows


def _rotate(windows: Tensor, spec: Spec, height: int, width: int, direction: int) -> Tensor:
    """Rotate the taps of windows by the distance that each moves to lie inside the map."""
    size, radius = spec.kernel_size, spec.kernel_size // 2
    # the exporter of traced modules fixes the size of every axis in unflatten
    taps = windows.reshape(*windows.shape[:2], size, size, *windows.shape[3:])
    for dim, targets, side in zip((2, 3), _targets(windows, spec), (height, width), strict=True):
        centres = targets * spec.down // spec.up
        moves = centres.clamp(min=radius).clamp(max=side - 1 - radius) - centres
        rotated = taps
        for move in range(-radius, radius + 1):
            if move:
                # without a gather, which would make a program slower to export and harder to port
                end = size - direction * move % size
                rolled = torch.cat([taps.narrow(dim, end, size - end), taps.narrow(dim, 0, end)], dim)
                rotated = torch.where(moves == move, rolled, rotated)
        taps = rotated
    return taps.flatten(2, 3)


def _cut(x: Tensor, dim: int, part: slice) -> Tensor:
    """Return a part of the rows (dim 2) or columns (dim 3) of `x`, by a slice, which serves any size in a traced program."""
    return x[..., part, :] if dim == 2 else x[..., part]


def pad_source(x: Tensor, spec: Spec) -> Tensor:
    """Pad x [N, C, H, W] by K // 2 on every side with the pixels that windows read there; zeros are left to the caller."""
    size, radius = spec.kernel_size, spec.kernel_size // 2
    if spec.border not in PADDED_BORDERS or not radius:
        return x
    if spec.border == "shift":
        before, after = [slice(size - radius, size)], [slice(-size, radius - size)]
    else:
        before, after = [slice(0, 1)] * radius, [slice(-1, None)] * radius
    for dim in (2, 3):
        x = torch.cat([*(_cut(x, dim, part) for part in before), x, *(_cut(x, dim, part) for part in after)], dim)
    return x


def fold_padding(dx: Tensor, spec: Spec) -> Tensor:
    """Add the gradient of the padding of `pad_source` to that of the pixels that it repeats: the transpose of `pad_source`."""
    size, radius = spec.kernel_size, spec.kernel_size // 2
    if spec.border not in PADDED_BORDERS or not radius:
        return dx
    for dim in (3, 2):
        side = dx.shape[dim] - 2 * radius
        before, inside, after = dx.split([radius, side, radius], dim)
        dx = inside.clone()
        if spec.border == "shift":
            dx.narrow(dim, size - radius, radius).add_(before)
            dx.narrow(dim, side - size, radius).add_(after)
        else:
            dx.narrow(dim, 0, 1).add_(before.sum(dim, keepdim=True))
            dx.narrow(dim, side - 1, 1).add_(after.sum(dim, keepdim=True))
    return dx
