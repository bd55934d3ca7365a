"""The sampler slot, and the samplers without parameters.

A slot is a constructor argument `Callable[[int], nn.Module]`: it takes the channels and returns a module that keeps the channels and
resizes by 2. `functools.partial` sets further options: `partial(CARAFE, up=2)`, `partial(DySample, groups=8)`.

Sizes: an upsampler turns H x W into 2H x 2W. A side of the finer map may be one pixel shorter, as in a backbone that rounds sizes up, or
one pixel longer, as in a backbone that rounds them down. A shorter output is cut at the bottom and right; a longer one repeats its last row
or column (`fit`). Any other size of the finer map is an error (`check_fit`). An upsampler whose `forward` has an argument `size` computes
the size of the finer map itself, `sampler(x, size=(rows, columns))`, as all upsamplers here without a guide do. The output of another
upsampler is cut or lengthened by the network (`resize`). A downsampler returns ceil(H / 2) x ceil(W / 2), as a 3x3 convolution or pool of
stride 2 and padding 1 does, so that it can replace either.

Guides: an upsampler whose class sets `needs_guide = True` also takes the finer map that its output is combined with, `sampler(x, guide)`,
with x [N, C, H, W] and guide [N, guide_channels, h, w], where h is 2H - 1, 2H or 2H + 1, and w is 2W - 1, 2W or 2W + 1. Its output is
[N, C, h, w]. Networks pass the guide (`make_sampler`, `resize`). Without a guide, as in a mask head, the sampler uses the bilinearly
upsampled x as its guide.

Rewritten guides: an upsampler may also improve the finer map that its output is combined with. Its class then has an attribute
`rewrites_guide = False` beside `needs_guide = True`, and its constructor an argument `rewrites_guide: bool = False`, which sets this
attribute of the instance. Where it is True, `sampler(x, guide)` returns a pair, the output [N, C, h, w] and the rewritten guide
[N, guide_channels, h, w]. A network that takes the pair sets the argument (`make_samplers(..., rewrites_guide=True)`), gets the pair from
`resize_pair`, and combines the rewritten guide with the output in the place of the finer map. Everywhere else the sampler returns its
output alone. FPN and the parts FPN and FUSE of UperNet take the pair. The pooled maps of a PPM share one guide, which stays as it is.

torch.fx cannot follow a condition on the size of a map. Functions with such a condition are marked by `torch.fx.wrap` and become one node
of its graph. The mark holds for the calls in one module: a module that imports such a function marks it again.
"""

import inspect
from collections.abc import Callable, Sequence

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels.geometry import Spec, output_size
from .slot_checks import build, check_half, check_map

torch.fx.wrap("check_half")
torch.fx.wrap("check_map")

# the scale of a sampler that does not have another in its own `spec`
DOUBLE = Spec(kernel_size=1, up=2)

Sampler = Callable[..., nn.Module]


def published() -> None:
    """Leave a slot empty, so that the network samples as published. This is the target of the `published` configuration files."""


def shared(slot: Sampler | None) -> Sampler | None:
    """Fill a slot with the sampler of the other slots.

    This is the target of the `shared` configuration file. A choice for a single slot replaces that file as a whole.
    """
    return slot


def make_sampler(slot: Sampler, channels: int, guide_channels: int, *, rewrites_guide: bool = False) -> nn.Module:
    """Make the sampler of a slot, `slot(channels)`.

    A guided sampler also takes `guide_channels`, the channels of the finer map. With `rewrites_guide`, a sampler that can rewrite the finer
    map is told to do so.

    Raises:
        TypeError: the slot does not make a module of the channels, or its forward does not take the map (and the guide).
    """
    # a partial hides its class in .func
    made = getattr(slot, "func", slot)
    if not getattr(made, "needs_guide", False):
        return build(slot, channels, {}, guided=False)
    options = {"rewrites_guide": True} if rewrites_guide and hasattr(made, "rewrites_guide") else {}
    return build(slot, channels, {"guide_channels": guide_channels, **options}, guided=True)


def make_samplers(slot: Sampler | None, channels: int, guide_channels: int, count: int, *, rewrites_guide: bool = False) -> nn.ModuleList:
    """Make `count` samplers of a slot, as `make_sampler` does; an empty slot gives a list of None."""
    samplers = (make_sampler(slot, channels, guide_channels, rewrites_guide=rewrites_guide) if slot else None for _ in range(count))
    # a list of modules may hold None, although torch's type hints do not say so
    return nn.ModuleList(samplers)  # pyright: ignore[reportArgumentType]


@torch.fx.wrap
def check_fit(coarse: Sequence[int], sampled: Sequence[int], fine: Sequence[int], slot: str) -> Sequence[int]:
    """Check that a map of size `sampled`, which a sampler makes from one of size `coarse`, fits a finer map of size `fine`.

    It fits if less than one cell of the coarse map has to be cut or added. Otherwise the ratio of the levels of the network is not that of
    the sampler, and the features would not be where those of the finer map are.

    Returns:
        `fine`. A graph of torch.fx keeps the check because the result is used.

    Raises:
        ValueError: the sizes do not fit; the message names them and the slot.
    """
    # a coarse cell has a width of sampled / coarse; a file of torch.export cannot hold a condition on abs()
    if not all((s - f) * c < s and (f - s) * c < s for c, s, f in zip(coarse, sampled, fine, strict=True)):
        sizes = [f"{height} x {width}" for height, width in (coarse, sampled, fine)]
        raise ValueError(
            f"the sampler in slot {slot} turns {sizes[0]} into {sizes[1]} pixels, but the finer map has {sizes[2]}: leave this slot "
            "empty (None; `published` on the command line), take a sampler with the ratio of the levels, or choose an output_stride of the "
            "backbone with which the ratio of the levels is that of the sampler"
        )
    return fine


@torch.fx.wrap
def fit(y: Tensor, size: Sequence[int]) -> Tensor:
    """Cut y [N, C, H, W] at the bottom and right to `size`; repeat its last row or column where `size` is longer."""
    if torch.compiler.is_exporting():
        # a slice or a condition on sizes would hold for the example only
        for side, longest in zip(size, y.shape[2:], strict=True):
            torch._check(side <= longest + 1)
        y = F.pad(y, (0, 1, 0, 1), mode="replicate")
        return F.pad(y, (0, size[1] - y.shape[3], 0, size[0] - y.shape[2]))
    y = y[..., : size[0], : size[1]]
    rows, columns = size[0] - y.shape[2], size[1] - y.shape[3]
    if rows > 0:
        y = torch.cat([y, *[y[..., -1:, :]] * rows], dim=2)
    if columns > 0:
        y = torch.cat([y, *[y[..., -1:]] * columns], dim=3)
    return y


@torch.fx.wrap
def fit_double(y: Tensor, x: Tensor, size: Sequence[int] | None) -> Tensor:
    """Fit y [N, C, 2H, 2W], upsampled from x [N, C, H, W], to `size`; None leaves y as it is.

    Raises:
        TypeError: `size` is not a pair of integers.
        ValueError: a side of `size` differs from that of y by more than 1.
    """
    return y if size is None else fit(y, output_size(x, DOUBLE, size))


def takes_size(sampler: nn.Module) -> bool:
    """Return whether the `forward` of a sampler has an argument `size`."""
    try:
        return "size" in inspect.signature(sampler.forward).parameters
    except ValueError:
        # a module of torch.jit.trace has no signature
        return False


def resize(x: Tensor, size: Sequence[int], sampler: nn.Module | None, guide: Tensor | None = None, *, slot: str = "upsample") -> Tensor:
    """Resize x [N, C, H, W] to `size`.

    Without a sampler, the interpolation is bilinear. A sampler resizes by 2, or by the scale of its `spec` as `CARAFE` does. `size` is
    passed to a sampler that takes it, and `guide` [N, guide_channels, *size] to a sampler that needs it. The output of another sampler is
    cut or lengthened to `size` (see `fit`).

    Raises:
        ValueError: the output of the sampler does not fit `size` (see `check_fit`); the message names `slot`.
        TypeError, ValueError: the output of the sampler is not a map with the channels of x.
    """
    if sampler is None:
        return F.interpolate(x, (size[0], size[1]), mode="bilinear", align_corners=False)
    name = type(sampler).__name__
    if getattr(sampler, "needs_guide", False):
        check_fit(x.shape[2:], output_size(x, DOUBLE), size, slot)
        y = sampler(x, guide)
        return check_map(y[0] if getattr(sampler, "rewrites_guide", False) else y, x, name)
    if takes_size(sampler):
        return check_map(sampler(x, size=check_fit(x.shape[2:], output_size(x, getattr(sampler, "spec", DOUBLE)), size, slot)), x, name)
    y = check_map(sampler(x), x, name)
    return fit(y, check_fit(x.shape[2:], y.shape[2:], size, slot))


def resize_pair(x: Tensor, fine: Tensor, sampler: nn.Module | None, *, slot: str) -> tuple[Tensor, Tensor]:
    """Resize x [N, C, H, W] to the size of the finer map that it is combined with, which is its guide.

    Returns:
        The resized map [N, C, h, w], and `fine` [N, guide_channels, h, w], which a sampler with `rewrites_guide` has rewritten.

    Raises:
        ValueError: the output of the sampler does not fit the finer map (see `check_fit`); the message names `slot`.
    """
    if getattr(sampler, "rewrites_guide", False) and sampler is not None:
        check_fit(x.shape[2:], output_size(x, DOUBLE), fine.shape[2:], slot)
        y, fine = sampler(x, fine)
        return y, fine
    return resize(x, fine.shape[2:], sampler, fine, slot=slot), fine


def halve(x: Tensor, sampler: nn.Module) -> Tensor:
    """Downsample x [N, C, H, W] by 2 with a sampler -> [N, C, ceil(H / 2), ceil(W / 2)].

    Raises:
        TypeError, ValueError: the output of the sampler is not a map with the channels of x, or has another size.
    """
    name = type(sampler).__name__
    return check_half(check_map(sampler(x), x, name), x, name)


def upsample_nearest(x: Tensor) -> Tensor:
    """Upsample x [N, C, H, W] to [N, C, 2H, 2W]: every pixel becomes a 2x2 block."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def upsample_bilinear(x: Tensor) -> Tensor:
    """Upsample x [N, C, H, W] to [N, C, 2H, 2W], bilinearly between pixel centres (align_corners=False)."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


@torch.fx.wrap
def shuffle_pixels(x: Tensor) -> Tensor:
    """Rearrange x [N, 4 C, H, W] from depth to space, to [N, C, 2H, 2W]."""
    n, channels, height, width = x.shape
    if n == 0:
        # the backward pass of F.pixel_shuffle gives an empty batch the wrong size
        return x.reshape(0, channels // 4, 2 * height, 2 * width)
    return F.pixel_shuffle(x, 2)


class Nearest(nn.Module):
    """Nearest-neighbour interpolation: every pixel becomes a 2x2 block. The upsampler of the published FPN (Table IV). No parameters."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, C, H, W] to [N, C, 2H, 2W], or to `size`, whose sides may differ from these by 1."""
        return fit_double(upsample_nearest(x), x, size)


class Bilinear(nn.Module):
    """Bilinear interpolation with pixel centres aligned (Table IV). No parameters, 8 FLOPs per output element."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, C, H, W] to [N, C, 2H, 2W], or to `size`, whose sides may differ from these by 1."""
        return fit_double(upsample_bilinear(x), x, size)


class MaxPool(nn.MaxPool2d):
    """Maximum over 3x3 at stride 2 (Table III). No parameters.

    The paper does not give the window. 3x3 is the window of ResNet's stem. Unlike 2x2, it keeps the rounded-up sizes and the window centres
    of the strided convolutions that it replaces.
    """

    def __init__(self, channels: int):
        super().__init__(kernel_size=3, stride=2, padding=1)


class AvgPool(nn.AvgPool2d):
    """Mean over 3x3 at stride 2 (Table III), with the window of `MaxPool`. No parameters.

    A window that extends beyond the map averages only the pixels inside, so that borders are not darkened.
    """

    def __init__(self, channels: int):
        super().__init__(kernel_size=3, stride=2, padding=1, count_include_pad=False)
