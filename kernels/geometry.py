"""The sizes, options and argument checks that all implementations of the operator share.

An output row i' (the same for columns) belongs to cell q = i' // up, sub-row dy = i' % up, and its window is centred on source row
q * down + (dy * down) // up, which is (i' * down) // up. With down == 1 a cell is a source pixel (up x up outputs share its window);
with up == 1 a cell is an output.

A window that leaves the map is treated as the option `border` says (BORDERS). "shift" moves the whole window into the map, so that its
taps are those of the nearest window inside.

The output has ceil(H * up / down) x ceil(W * up / down) pixels, unless a call asks for another size. A side may be up to up - 1 pixels
shorter, so that the last cell is cut, or up to up - 1 pixels longer. The pixels beyond ceil(H * up / down) repeat the last row or column.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

NORMALIZERS = ("softmax", "sigmoid", "sigmoid_normalized", "none")
# normalizers that divide by a sum over the window; forward saves the logarithm of this sum for backward
LSE_NORMALIZERS = ("softmax", "sigmoid_normalized")
# what the taps of a window outside the map do: read zeros; are left out of the normalisation; read the nearest pixel of the map; move
# into the map together with the whole window
BORDERS = ("zero", "renormalize", "replicate", "shift")
# borders at which windows read pixels of the map again instead of zeros
PADDED_BORDERS = ("replicate", "shift")


class Spec(NamedTuple):
    """The options of one reassembly."""

    kernel_size: int
    up: int = 1
    down: int = 1
    groups: int = 1
    normalizer: str = "softmax"
    border: str = "zero"

    @property
    def taps(self) -> int:
        """Number of weights of a window."""
        return self.kernel_size**2

    # sizes are rounded up without a division of a negative number, which ONNX rounds towards zero

    def output_size(self, size: int) -> int:
        """Return the rows (columns) of the output for `size` source rows (columns)."""
        return (size * self.up + self.down - 1) // self.down

    def cells(self, size: int) -> int:
        """Return the rows (columns) of the logits for `size` source rows (columns)."""
        return (size + self.down - 1) // self.down


def is_scale(value: object) -> TypeGuard[float]:
    """Return whether `value` is a number that somebody may mean as a scale."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.01 <= value <= 100


def write_scale(scale: float) -> str:
    """Write a scale as options: 2 as "up=2", 0.5 as "down=2", 1.5 as "up=3, down=2"."""
    # only messages of errors need it
    from fractions import Fraction

    ratio = Fraction(scale).limit_denominator(100)
    sides = {"up": ratio.numerator, "down": ratio.denominator}
    return ", ".join(f"{name}={side}" for name, side in sides.items() if side > 1) or "up=1"


def check_spec(spec: Spec) -> None:
    """Raise TypeError or ValueError, naming the option, unless every option is in its domain."""
    for name in ("kernel_size", "up", "down", "groups"):
        value = getattr(spec, name)
        if isinstance(value, bool) or not isinstance(value, int):
            scaled = name in ("up", "down") and isinstance(value, float) and is_scale(value)
            right = f"; write {write_scale(value if name == 'up' else 1 / value)}" if scaled else ""
            raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}{right}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if spec.kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that a window has a centre, got {spec.kernel_size}")
    if spec.normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {spec.normalizer!r}")
    if spec.border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(BORDERS)}, got {spec.border!r}")
    if spec.border == "renormalize" and spec.normalizer not in LSE_NORMALIZERS:
        raise ValueError(
            f"border 'renormalize' needs a normalizer that divides the weights of a window by their sum, {' or '.join(LSE_NORMALIZERS)}, "
            f"got {spec.normalizer!r}"
        )


def is_traced() -> bool:
    """Return whether the tracer of TorchScript records: `torch.jit.trace`, or the ONNX exporter that is based on it."""
    return torch._C._get_tracing_state() is not None


def output_size(x: Tensor, spec: Spec, size: Sequence[int] | None = None) -> tuple[int, int]:
    """Return the rows and columns of the output for a source `x` [N, C, H, W]: `size` if it is given and can be had.

    Raises:
        TypeError: `size` is not a pair of integers.
        ValueError: a side of `size` differs by `up` or more from the side that the scale gives.
    """
    height, width = x.shape[2:]
    natural = spec.output_size(height), spec.output_size(width)
    if size is None:
        return natural
    # the tracer of TorchScript gives a side as a tensor
    integers = (int, torch.SymInt, Tensor) if is_traced() else (int, torch.SymInt)
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(side, integers) for side in size):
        raise TypeError(f"size must be a pair of integers (rows, columns), got {size!r}")
    rows, columns = size
    # without min() and abs(), which a file of torch.export cannot hold
    fits = (side >= 1 and side < whole + spec.up and whole < side + spec.up for side, whole in zip(size, natural, strict=True))
    if not all(fits):
        raise ValueError(
            f"size must be at least 1 and differ by less than up={spec.up} pixels from {natural[0]} x {natural[1]}, the output size for "
            f"{height} x {width} with up={spec.up}, down={spec.down}; got {rows} x {columns}"
        )
    return rows, columns


def check_inputs(x: Tensor, weights: Tensor, spec: Spec, size: Sequence[int] | None = None, *, name: str = "logits") -> tuple[int, int]:
    """Check that `x` and `weights` fit.

    `name` is "logits" in encoder layout, "padded logits" if they may have further channels, or "weights" at output resolution.

    Returns:
        The rows and columns of the output: `size`, or those that the scale gives.

    Raises:
        TypeError, ValueError: an option, a tensor or `size` is wrong; the message names it.
    """
    check_spec(spec)
    for argument, tensor in (("x", x), (name, weights)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(f"{argument} must be a dense tensor, got {'a nested one' if tensor.is_nested else f'layout {tensor.layout}'}")
        if tensor.dim() != 4:
            raise ValueError(f"{argument} must have 4 dimensions [N, C, H, W], got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{argument} must be of a floating-point dtype, got {tensor.dtype}")
    if x.dtype != weights.dtype:
        raise TypeError(f"x and {name} must have the same dtype, got {x.dtype} and {weights.dtype}")
    if x.device != weights.device:
        raise ValueError(f"x and {name} must be on the same device, got {x.device} and {weights.device}")
    n, c, h, w = x.shape
    if c < 1 or h < 1 or w < 1:
        raise ValueError(f"x must have C, H, W of at least 1, got shape {tuple(x.shape)}")
    if c % spec.groups:
        raise ValueError(f"groups must divide the channels of x, got groups={spec.groups} for {c} channels")
    if spec.border == "shift" and min(h, w) < spec.kernel_size:
        raise ValueError(
            f"border 'shift' needs a map of at least kernel_size={spec.kernel_size} rows and columns, in which a whole window fits, got "
            f"x of {h} x {w}"
        )
    size = output_size(x, spec, size)
    channels = spec.groups * spec.taps
    if name == "weights":
        expected = (n, channels, *size)
    else:
        channels *= spec.up**2
        expected = (n, max(channels, weights.shape[1]) if name == "padded logits" else channels, spec.cells(h), spec.cells(w))
    if tuple(weights.shape) != expected:
        raise ValueError(
            f"{name} must have shape {expected} for x of shape {tuple(x.shape)}, kernel_size={spec.kernel_size}, "
            f"up={spec.up}, down={spec.down}, groups={spec.groups}, got {tuple(weights.shape)}"
        )
    return size


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of `x` [N, C, H, W] are its fastest axis; the output then has the same memory format."""
    return x.stride(1) == 1 and x.size(1) > 1 and x.stride(3) != 1


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of an output that is computed from `x`."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format
