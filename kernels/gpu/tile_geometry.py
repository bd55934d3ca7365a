"""The geometry of a tile: the sources that its targets read, the targets that read its sources, and the rounding of tile axes.

A tile is `cells_h` x `cells_w` cells. Its targets read a halo of sources around it, and targets around it read its sources. Along rows of
pixels, both extents begin and end at a multiple of `vector` elements, so that they can be loaded in vectors. The axes of a matrix product
are rounded up to a power of two of at least 16.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

from ..geometry import Spec

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
# the launches that have tiles: forward, both gradients, the gradient to the logits, and the gradient to the features
KernelName = Literal["forward", "backward", "logit_gradient", "source_gradient"]
KERNELS: tuple[KernelName, ...] = ("forward", "backward", "logit_gradient", "source_gradient")
# smallest axis of a matrix product in Triton
SMALLEST_EXTENT = 16


class Tile(NamedTuple):
    """The division of the work of a banded kernel."""

    cells_h: int
    cells_w: int
    vector: int  # elements of a vector load along rows of pixels; the halo is rounded to a multiple
    block_c: int  # channels of one product
    split: int  # programs that share the channels of a tile; 1 in the gradient to the logits, which sums over channels
    num_warps: int
    num_stages: int
    max_registers: int = 255  # per thread; values beyond it spill


class TileProblem(NamedTuple):
    """The properties of a call that the choice of a tile depends on."""

    spec: Spec
    channels: int  # of one group
    height: int  # cells
    width: int
    batch: int  # images times groups
    element_size: int  # bytes
    channels_last: bool
    x_align: int  # every run of source features begins and ends at a multiple of this number of elements
    y_align: int  # the same for target features
    capability: tuple[int, int]


class Halo(NamedTuple):
    """The targets of a tile and the sources that their windows cover."""

    rows: int  # of targets
    cols: int
    height: int  # of sources
    width: int
    lead: int  # columns of sources before those of the tile: kernel_size // 2, rounded up to a multiple of the vector
    m: int  # targets, as an axis of a product
    p: int  # sources
    t: int  # taps of a window and at least one more


class Reach(NamedTuple):
    """The sources of a tile and the targets whose windows cover any of them."""

    rows: int  # of sources
    cols: int
    height: int  # of targets
    width: int
    before: int  # rows of targets before those of the tile
    lead: int  # columns of targets before those of the tile: `before`, rounded up to a multiple of the vector
    s: int  # sources, as an axis of a product


def power_of_two(n: int) -> int:
    """Return the smallest power of two at or above n, at least 16: the extent of a tile axis in a matrix product."""
    return max(SMALLEST_EXTENT, 1 << (n - 1).bit_length())


def multiple(n: int, step: int) -> int:
    """Return the smallest multiple of `step` at or above n."""
    return -(-n // step) * step


@lru_cache(maxsize=4096)
def halo(spec: Spec, cells_h: int, cells_w: int, vector: int = 1) -> Halo:
    """Return the targets of a tile and the sources that they read."""
    rows, cols = cells_h * spec.up, cells_w * spec.up
    radius = spec.kernel_size // 2
    lead = multiple(radius, vector)
    height = (rows - 1) * spec.down // spec.up + spec.kernel_size
    width = multiple(lead + (cols - 1) * spec.down // spec.up + radius + 1, vector)
    return Halo(rows, cols, height, width, lead, power_of_two(rows * cols), power_of_two(height * width), power_of_two(spec.taps + 1))


@lru_cache(maxsize=4096)
def reach(spec: Spec, cells_h: int, cells_w: int, vector: int = 1) -> Reach:
    """Return the sources of a tile and the targets that read them."""
    rows, cols = cells_h * spec.down, cells_w * spec.down
    radius = spec.kernel_size // 2
    before = radius * spec.up // spec.down
    lead = multiple(before, vector)
    height = -(-(rows + radius) * spec.up // spec.down) + before
    width = multiple(lead - (-(cols + radius) * spec.up // spec.down), vector)
    return Reach(rows, cols, height, width, before, lead, power_of_two(rows * cols))
