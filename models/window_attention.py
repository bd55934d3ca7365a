"""Attention of a fine map to windows of a coarse one, with which NAF and AnyUp bring dense features to the resolution of an image.

Queries have the target size; keys and values have the size of the features, up to 16 times smaller. A query attends to the K x K pixels
around its own pixel of the coarse map. At the border, the window moves inside, as in neighborhood attention (Hassani et al., 2023). The
operator computes both products, so that neither keys nor values are copied to the target size: only the scores have it.
"""

import math

import torch
import torch.fx
import torch.nn as nn
from torch import Tensor

from ..kernels import reassemble
from .guides import multiply_windows

torch.fx.wrap("multiply_windows")


@torch.fx.wrap
def attend_windows(
    queries: Tensor, keys: Tensor, values: Tensor, *, up: int, kernel_size: int, heads: int = 1, average_heads: bool = False
) -> Tensor:
    """Sum the values of the window of each query, weighted by the softmax of its scaled products with the keys there.

    Args:
        queries: [N, E, h, w]. The target size h x w is up * H x up * W; each side may be less than `up` shorter.
        keys: [N, E, H, W], of which `heads` divides E.
        values: [N, C, H, W], of which `heads` divides C unless `average_heads`.
        up: ratio of the sizes of queries and keys.
        kernel_size: K, side of the window; odd, at most H and W.
        heads: parts of the channels of queries and keys, each with its own softmax.
        average_heads: whether all channels of the values take the mean of the heads' weights (AnyUp), instead of each part those of its own
            head (NAF).

    Returns:
        [N, C, h, w] in the memory format of the values.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value; the message names it and says what would be right.
    """
    _check(queries, keys, values, up, heads, average_heads)
    scale = math.sqrt(keys.shape[1] // heads)
    queries, keys = (part.to(values.dtype) for part in (queries / scale, keys))
    scores = multiply_windows(queries, keys, kernel_size, up, groups=heads, border="shift", size=queries.shape[2:])
    options = {"kernel_size": kernel_size, "up": up, "border": "shift", "size": queries.shape[2:]}
    if not average_heads:
        return reassemble(values, scores, groups=heads, **options)
    weights = scores.unflatten(1, (heads, kernel_size**2, up**2)).softmax(dim=2).mean(dim=1).flatten(1, 2)
    return reassemble(values, weights, normalizer="none", **options)


def _check(queries: Tensor, keys: Tensor, values: Tensor, up: int, heads: int, average_heads: bool) -> None:
    """Raise ValueError if channels or sizes do not fit."""
    if isinstance(up, bool) or not isinstance(up, int):
        raise TypeError(f"up must be an int, got {up!r} of type {type(up).__name__}")
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads must be an int, got {heads!r} of type {type(heads).__name__}")
    for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [N, C, H, W], got shape {tuple(tensor.shape)}")
    if keys.shape[2:] != values.shape[2:] or queries.shape[:2] != keys.shape[:2]:
        raise ValueError(
            f"keys must have the size of the values, {tuple(values.shape[2:])}, and the batch and channels of the queries, "
            f"{tuple(queries.shape[:2])}, got shape {tuple(keys.shape)}"
        )
    if heads < 1 or keys.shape[1] % heads or (not average_heads and values.shape[1] % heads):
        raise ValueError(f"heads must divide the channels of keys, {keys.shape[1]}, and values, {values.shape[1]}, got {heads}")
    if not all(up * (coarse - 1) < fine <= up * coarse for fine, coarse in zip(queries.shape[2:], keys.shape[2:], strict=True)):
        raise ValueError(
            f"queries must have {up} times the size of the keys, {tuple(keys.shape[2:])}, or less than {up} pixels less, "
            f"got {tuple(queries.shape[2:])}"
        )


class AnyUpAttention(nn.Module):
    """The attention of AnyUp (Wimmer et al., 2025): it upsamples features of any image encoder with queries and keys of E channels.

    Queries pass through a 3x3 convolution; queries and keys through RMS normalisation and a 1x1 convolution each. Every channel of the
    values takes the mean of the heads' weights. State-dict keys and results are those of the authors' block for neighborhood attention
    (`NATTENCrossAttentionBlock`) at integer ratios, for windows of equal sides. 128 channels have 180,736 parameters.

    Args:
        channels: E, the channels of queries and keys.
        up: ratio of the sizes of queries and values.
        kernel_size: K, side of the window. The authors take a fifth of each side of the values, at least 3, rounded up to an odd number.
            Their windows are therefore not always square where the values are not, and such windows are not supported here.
        heads: heads of the attention; divides E.
    """

    def __init__(self, channels: int = 128, *, up: int, kernel_size: int, heads: int = 4):
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads must divide channels, got heads={heads} for channels={channels}")
        self.up, self.kernel_size, self.heads = up, kernel_size, heads
        self.conv2d = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(channels), nn.RMSNorm(channels)
        self.cross_attn = nn.ModuleDict({"q_proj": nn.Conv2d(channels, channels, 1), "k_proj": nn.Conv2d(channels, channels, 1)})

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Upsample values [N, C, H, W] to the size of queries [N, E, h, w], with keys [N, E, H, W].

        Raises:
            TypeError, ValueError: as for `attend_windows`.
        """
        queries = self.cross_attn["q_proj"](self.norm_q(self.conv2d(queries).movedim(1, -1)).movedim(-1, 1))
        keys = self.cross_attn["k_proj"](self.norm_k(keys.movedim(1, -1)).movedim(-1, 1))
        options = {"up": self.up, "kernel_size": self.kernel_size, "heads": self.heads}
        return attend_windows(queries, keys, values, average_heads=True, **options)
