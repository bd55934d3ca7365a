"""Comparison of an exported file with its network, on images of random values."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .sizes import Size

# largest difference in relation to the largest absolute output, by the dtype of the file
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}

Run = Callable[[Sequence[Tensor]], list[Tensor]]


class Difference(NamedTuple):
    """The largest difference between a file and its network at one size of the input.

    Attributes:
        output: name of the output with the largest relative difference.
        absolute: largest difference in this output.
        relative: the same in relation to the largest absolute value of this output.
    """

    batch: int
    height: int
    width: int
    output: str
    absolute: float
    relative: float


def make_inputs(channels: Mapping[str, int], size: Size, seed: int = 0) -> list[Tensor]:
    """Make random inputs [N, channels, H, W] in float32: images are uniform in [0, 1], and a mask is 1 in a rectangle."""
    batch, height, width = size
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.rand(batch, count, height, width, generator=generator) for name, count in channels.items()}
    if "masks" in inputs:
        inputs["masks"].zero_()[..., height // 4 : height // 4 + (height + 1) // 2, width // 3 : width // 3 + (width + 2) // 3] = 1
    return list(inputs.values())


def list_outputs(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of a network, one or several, as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def format_size(size: Size) -> str:
    """Format a size as "batch 2, 426 x 353"."""
    batch, height, width = size
    return f"batch {batch}, {height} x {width}"


def run_network(network: nn.Module, channels: Mapping[str, int], sizes: Sequence[Size], device: str) -> dict[Size, list[Tensor]]:
    """Compute the outputs of a network on the CPU for `make_inputs` of every size.

    Raises:
        ValueError: the network does not take a size.
    """
    expected = {}
    for size in sizes:
        inputs = [value.to(device) for value in make_inputs(channels, size)]
        try:
            with torch.no_grad():
                expected[size] = [output.cpu() for output in list_outputs(network(*inputs))]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"the network does not take images of {format_size(size)} ({type(error).__name__}: {error}): give size=, or height= and "
                "width=, that it takes"
            ) from error
    return expected


def compare(
    run: Run, expected: Mapping[Size, Sequence[Tensor]], channels: Mapping[str, int], outputs: Sequence[str], dtype: torch.dtype
) -> list[Difference]:
    """Compare the outputs of a file with those of its network at every size.

    Args:
        run: runs the file on inputs in `dtype`.
        expected: the outputs of the network in float32, for `make_inputs` of every size.
        channels, outputs: as in `Exportable`.

    Raises:
        ValueError: the file does not run at a size, an output has another shape, or a difference is above the tolerance of the dtype.
    """
    differences = []
    for size, wanted in expected.items():
        try:
            found = run([value.to(dtype) for value in make_inputs(channels, size)])
        except Exception as error:
            raise ValueError(f"the file does not run at {format_size(size)}, which the network takes: {error}") from error
        shapes = [[tuple(output.shape) for output in values] for values in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the file gives outputs of shapes {shapes[0]} at {format_size(size)}, the network {shapes[1]}")
        each = [Difference(*size, name, *_measure(actual, output)) for name, actual, output in zip(outputs, found, wanted, strict=True)]
        # a difference that is not a number is the worst
        worst = max(each, key=lambda difference: (difference.relative != difference.relative, difference.relative))
        if not worst.relative <= TOLERANCES[dtype]:
            raise ValueError(
                f"the output {worst.output} of the file differs from that of the network by {worst.absolute:.3g} at {format_size(size)}, "
                f"{worst.relative:.3g} of its largest value; the tolerance for {str(dtype).removeprefix('torch.')} is {TOLERANCES[dtype]:g}"
            )
        differences.append(worst)
    return differences


def _measure(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference, and its relation to the largest expected value."""
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference, difference / scale if scale else difference
