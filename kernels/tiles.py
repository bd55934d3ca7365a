"""Which kernel and which tile serve a problem: a pure function of its shape, data type, memory format and the capability of the device."""

from typing import NamedTuple

from .geometry import Spec


class Problem(NamedTuple):
    """What the choice depends on."""

    spec: Spec
    channels: int  # of one group
    height: int  # cells
    width: int
    batch: int  # images times groups
    element_size: int  # bytes
    channels_last: bool
    capability: tuple[int, int]


class Tile(NamedTuple):
    """How a banded kernel cuts its work."""

    cells_h: int
    cells_w: int
    block_c: int  # channels of one product
    split: int  # programs that share the channels of a tile
    num_warps: int
    num_stages: int


def power_of_two(n: int) -> int:
    """Smallest power of two at or above n."""
    return 1 << (n - 1).bit_length()


def halo(spec: Spec, cells: int) -> int:
    """Source rows (columns) that the windows of `cells` cells cover."""
    return (cells * spec.up - 1) * spec.down // spec.up + spec.kernel_size


def reach(spec: Spec, cells: int) -> int:
    """Target rows (columns) whose windows touch the source pixels of `cells` cells."""
    radius = spec.kernel_size // 2
    return -(-(cells * spec.down + radius) * spec.up // spec.down) + radius * spec.up // spec.down


def forward_tile(problem: Problem) -> Tile | None:
    """Tile of the banded forward kernel, or None where a window is too large for it."""
    spec = problem.spec
    cells = (2, 4) if problem.channels_last else (1, 8)
    if halo(spec, cells[0]) * halo(spec, cells[1]) > 256 or spec.up > 4:
        return None
    return Tile(*cells, 64 if problem.element_size == 2 else 32, 1, 2, 2)


def backward_tile(problem: Problem) -> Tile | None:
    """Tile of the banded backward kernel, or None where a window is too large for it."""
    spec = problem.spec
    cells = (4, 4)
    if reach(spec, cells[0]) * reach(spec, cells[1]) > 512 or halo(spec, cells[0]) * halo(spec, cells[1]) > 256:
        return None
    return Tile(*cells, 64 if problem.element_size == 2 else 32, 1, 2, 1)
