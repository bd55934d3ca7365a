"""What the guided samplers share: the guide and its size, windows of the coarse map at fine pixels, and similarities.

The size of the guide is that of the output. It may be one pixel longer than 2H or 2W. `prepare_guide` checks it, `cut_to_double` cuts it to
the pixels that belong to a pixel of the coarse map, and `fit` of samplers.py repeats the last row or column of what is computed from these.
"""

import functools
from collections.abc import Sequence

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reassemble_weights
from ..kernels.backends import default_backend
from ..kernels.reference import reassemble_reference
from .samplers import fit, upsample_bilinear

torch.fx.wrap("fit")


class Guided(nn.Module):
    """Base of the guided samplers: holds the channels of the guide, those of x unless `guide_channels` is given."""

    needs_guide = True

    def __init__(self, channels: int, guide_channels: int | None):
        super().__init__()
        self.guide_channels = guide_channels or channels


@torch.fx.wrap
def prepare_guide(x: Tensor, guide: Tensor | None, channels: int) -> Tensor:
    """Return the guide, or x upsampled bilinearly if there is none.

    Raises:
        ValueError: the guide does not have `channels` channels, or not twice the size of x, or 1 pixel less or more.
    """
    if guide is None:
        guide = upsample_bilinear(x)
    # without abs(), which a file of torch.export cannot hold
    if guide.shape[1] != channels or not all(
        -1 <= fine - 2 * coarse <= 1 for fine, coarse in zip(guide.shape[2:], x.shape[2:], strict=True)
    ):
        raise ValueError(
            f"guide must have {channels} channels and twice the size of x, or 1 pixel less or more, "
            f"got {tuple(guide.shape)} for x of shape {tuple(x.shape)}"
        )
    return guide


@torch.fx.wrap
def cut_to_double(guide: Tensor, x: Tensor) -> Tensor:
    """Cut a fine map to the pixels that belong to a pixel of x, at most [N, C, 2H, 2W] for x [N, C, H, W]."""
    rows, columns = 2 * x.shape[2], 2 * x.shape[3]
    # a cut of nothing would still change the order in which gradients are summed
    return guide[..., :rows, :columns] if guide.shape[2] > rows or guide.shape[3] > columns else guide


def pad_to_even(x: Tensor) -> Tensor:
    """Pad odd sides of x with zeros, at the bottom and right."""
    return F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))


def split_phases(x: Tensor) -> Tensor:
    """View x [N, M, 2 H, 2 W] as [N, M, H, 2, W, 2]."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))


def space_to_depth(x: Tensor) -> Tensor:
    """Rearrange a fine map [N, M, h, w] to [N, M * 4, ceil(h / 2), ceil(w / 2)], the layout of `reassemble`'s logits."""
    # F.pixel_unshuffle does not change the size of empty batches
    return split_phases(pad_to_even(x)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


@torch.fx.wrap
def sum_windows(x: Tensor, weights: Tensor, kernel_size: int, normalizer: str = "none", border: str = "zero") -> Tensor:
    """Sum the windows of a coarse map with weights of fine pixels.

    Args:
        x: [N, C, H, W].
        weights: [N, K * K, h, w], where h is 2H - 1, 2H or 2H + 1, and w is 2W - 1, 2W or 2W + 1. Weights beyond 2H x 2W are not read.
        kernel_size: K, side of the window.
        normalizer, border: as for `carafepp.kernels.reassemble_weights`.

    Returns:
        [N, C, h, w]. Row 2H and column 2W repeat those before them.
    """
    inside = cut_to_double(weights, x).to(x.dtype)
    options = {"kernel_size": kernel_size, "up": 2, "normalizer": normalizer, "border": border}
    return fit(reassemble_weights(x, inside, size=inside.shape[2:], **options), weights.shape[2:])


@torch.fx.wrap
def multiply_windows(
    queries: Tensor,
    keys: Tensor,
    kernel_size: int,
    up: int = 2,
    *,
    groups: int = 1,
    border: str = "zero",
    size: Sequence[int] | None = None,
) -> Tensor:
    """Compute the inner products of every query with the keys of its window.

    Reassembly is linear in its weights, and these products are its derivative with respect to the weights. The backward pass of the
    operator therefore computes them directly, on a CPU 60 times faster than unfolding the keys.

    Args:
        queries: [N, E, up * H, up * W], or [N, E, *size].
        keys: [N, E, H, W].
        kernel_size: K, side of the window.
        up: ratio of the sizes.
        groups: parts of the channels with products of their own; divides E.
        border: what windows do that leave the map, as for `carafepp.kernels.reassemble`. With "zero", products with keys outside are 0.
        size: rows and columns of queries of another size; each is less than `up` shorter.

    Returns:
        [N, groups * K * K * up**2, H, W], the layout of `reassemble`'s logits.
    """
    n, _, h, w = keys.shape
    shape = n, groups * kernel_size**2 * up**2, h, w
    options = size or (up * h, up * w), kernel_size, up, 1, groups, "none", border, False
    if default_backend(keys.device.type, keys.dtype) == "reference":
        # such devices have no kernel for the derivative
        names = ("size", "kernel_size", "up", "down", "groups", "normalizer", "border")
        reassemble_keys = functools.partial(reassemble_reference, keys, **dict(zip(names, options, strict=False)))
        return torch.func.vjp(reassemble_keys, keys.new_zeros(shape))[1](queries)[0]
    weights = keys.new_zeros(1).expand(shape)
    return torch.ops.carafepp.reassemble_backward(
        queries, keys, weights, keys.new_empty(0), *options, None, need_dx=False, need_dlogits=True
    )[1]
