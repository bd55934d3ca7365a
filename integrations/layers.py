"""What resamples: a description of every layer whose place a sampler can take, read from its options."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch.nn as nn

from .adapters import FittedSampler, SampledConv, SampledDeconv, SizedSampler, remove_stride

Direction = Literal["up", "down"]
Pair = tuple[int, int]
Sides = tuple[int, ...]


@dataclass
class Resampling:
    """What a layer does, and how a sampler takes its place.

    Attributes:
        name: the layer, in words.
        direction: "up" or "down"; None for an interpolation to a size, which only a forward tells.
        scale: factor of rows and columns; None for an interpolation to a size.
        channels: channels that the sampler gets, if the layer tells.
        assemble: takes the sampler and returns the module for the place.
        reads_image: whether the layer is a strided convolution of at most 4 channels, which the paper keeps.
        reason: why no sampler can take its place; empty if one can.
    """

    name: str
    direction: Direction | None
    scale: tuple[float, float] | None
    channels: int | None = None
    assemble: Callable[[nn.Module], nn.Module] = lambda sampler: sampler
    reads_image: bool = False
    reason: str = ""


def pair(value: Any) -> tuple[Any, Any]:
    """Return two of a value that stands for rows and columns."""
    first, *rest = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    return (first, rest[0] if rest else first)


def name_layer(kind: str, kernel_size: Sequence[int], stride: Sequence[int]) -> str:
    """Name a layer: its class, kernel size and stride."""
    return f"{kind} k{by(pair(kernel_size))} s{by(pair(stride))}"


def by(sides: tuple[Any, Any]) -> str:
    """Write rows and columns as one number where they are equal: 3 or 3x5."""
    rows, columns = (f"{side:g}" if isinstance(side, float) else str(side) for side in sides)
    return rows if rows == columns else f"{rows}x{columns}"


def read_layer(module: nn.Module) -> Resampling | None:
    """Describe a module that resamples; return None for any other."""
    kind = type(module).__name__
    if isinstance(module, nn.Upsample):
        return read_interpolation(kind, module.size, module.scale_factor, module.mode)
    if isinstance(module, nn.ConvTranspose2d):
        return read_deconv(kind, module)
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        return read_pool(kind, module)
    if isinstance(module, nn.Conv2d):
        return read_conv(kind, module)
    if "blurpool" in kind.lower() and hasattr(module, "stride"):
        return read_blur_pool(kind, module)
    return None


def read_interpolation(kind: str, size: Any, scale_factor: Any, mode: str) -> Resampling | None:
    """Describe an interpolation of images to a fixed size or by a factor."""
    if mode in ("linear", "trilinear", "area"):
        return None
    if size is not None:
        sides = cast(Pair, pair(size))
        return Resampling(f"{kind} to {by(sides)} {mode}", None, None, assemble=lambda sampler: SizedSampler(sampler, sides))
    factors = pair(scale_factor)
    name = f"{kind} x{by(factors)} {mode}"
    if min(factors) >= 1:
        return Resampling(name, "up", factors)
    # an interpolation by 1 / scale rounds sizes down
    scale = 1 / factors[0], 1 / factors[1]
    return assemble_fitted(Resampling(name, "down", scale), (round(scale[0]) - 1, round(scale[1]) - 1))


def read_deconv(kind: str, deconv: nn.ConvTranspose2d) -> Resampling | None:
    """Describe a transposed convolution with a stride."""
    scale = cast(Pair, deconv.stride)
    if max(scale) == 1:
        return None
    options = (deconv.kernel_size, scale, deconv.padding, deconv.dilation, deconv.output_padding)
    excess = tuple(d * (k - 1) - 2 * cast(int, p) + o + 1 - s for k, s, p, d, o in zip(*options, strict=True))
    name = name_layer(kind, deconv.kernel_size, scale)
    found = Resampling(name, "up", scale, deconv.out_channels, lambda sampler: SampledDeconv(sampler, deconv, cast(Pair, excess)))
    if any(abs(e) >= s for e, s in zip(excess, scale, strict=True)):
        found.reason = f"its output has {by(cast(Pair, excess))} pixels more than {by(scale)} times the input"
    return found


def read_pool(kind: str, pool: nn.MaxPool2d | nn.AvgPool2d) -> Resampling | None:
    """Describe a pool with a stride."""
    kernel_size, scale, padding = pair(pool.kernel_size), pair(pool.stride), pair(pool.padding)
    if max(scale) == 1:
        return None
    dilation = pair(pool.dilation) if isinstance(pool, nn.MaxPool2d) else (1, 1)
    found = Resampling(name_layer(kind, kernel_size, scale), "down", scale)
    if getattr(pool, "return_indices", False):
        found.reason = "its indices are used elsewhere (return_indices=True)"
    elif getattr(pool, "divisor_override", None) is not None:
        found.reason = "its divisor_override scales the output"
    if kind.endswith("Same"):
        return found
    return assemble_fitted(found, measure_shortfall(kernel_size, scale, padding, dilation, pool.ceil_mode))


def read_conv(kind: str, conv: nn.Conv2d) -> Resampling | None:
    """Describe a convolution with a stride."""
    scale = cast(Pair, conv.stride)
    if max(scale) == 1:
        return None
    padding = (0, 0) if isinstance(conv.padding, str) else cast(Pair, conv.padding)
    shortfall = measure_shortfall(conv.kernel_size, scale, padding, conv.dilation, False)
    name = name_layer(kind, conv.kernel_size, scale)
    assemble = lambda sampler: SampledConv(sampler, remove_stride(conv))  # noqa: E731
    found = Resampling(name, "down", scale, conv.in_channels, assemble, conv.in_channels <= 4)
    if "forward" in vars(conv):
        found.reason = "its forward is patched, so that it may not follow its stride"
    # a subclass that pads by itself, as for weights of TensorFlow, gives sizes that are rounded up
    return found if kind.endswith("Same") else assemble_fitted(found, shortfall, margin=True)


def read_blur_pool(kind: str, pool: nn.Module) -> Resampling | None:
    """Describe a blur pool, whose classes share only their name and `stride`. One with parameters also does something else."""
    scale = cast(Pair, pair(pool.stride))
    if max(scale) == 1 or next(pool.parameters(), None) is not None:
        return None
    return Resampling(f"{kind} s{by(scale)}", "down", scale)


def measure_shortfall(kernel_size: Sides, scale: Sides, padding: Sides, dilation: Sides, ceil_mode: bool) -> Pair:
    """Return n, for rows and columns, where windows give ceil((H - n) / scale) rows."""
    axes = zip(kernel_size, scale, padding, dilation, strict=True)
    short = [d * (k - 1) - 2 * p - (s - 1 if ceil_mode else 0) for k, s, p, d in axes]
    return short[0], short[1]


def assemble_fitted(found: Resampling, shortfall: Pair, margin: bool = False) -> Resampling:
    """Let a downsampler be cut to the size of the layer, or say that the sizes are too different."""
    if found.scale is None or not any(shortfall):
        return found
    scale, assemble = found.scale, found.assemble
    if all(0 <= n <= s for n, s in zip(shortfall, scale, strict=True)):
        found.assemble = lambda sampler: assemble(FittedSampler(sampler, round(scale[0]), shortfall, margin))
    elif not found.reason:
        found.reason = f"its padding makes maps that are not 1/{by(scale)} of the input, rounded up or down"
    return found
