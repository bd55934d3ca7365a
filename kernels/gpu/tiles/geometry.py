"""The geometry of a tile: the sources that its targets read, the targets that read its sources, and the rounding of tile axes.

A tile is `cells_h` x `cells_w` cells. Its targets read a halo of sources around it, and targets around it read its sources. Along rows of
pixels, both extents begin and end at a multiple of `vector` elements, so that they can be loaded in vectors. The axes of a matrix product
are rounded up to a power of two of at least 16.
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from ...geometry import Spec

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
# the launches that have tiles: forward, both gradients, the gradient to the logits, and the gradient to the features
KernelName = Literal["forward", "backward", "logit_gradient", "source_gradient"]
KERNELS: tuple[KernelName, ...] = get_args(KernelName)
# the kernels that may read source features in NCHW, which their tiles share, in a channels_last copy
COPYING: tuple[KernelName, ...] = ("forward", "logit_gradient")
# smallest axis of a matrix product in Triton
SMALLEST_EXTENT = 16
# places of a product with targets, over the targets
MOST_PADDING = 1.25


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
    # tiles of a program, one below the other: the gradient to the features visits one after the other, unless it is 1, and that to the
    # logits computes all at the same time; 1 in the other kernels
    steps: int = 1
    # 1: source features in NCHW are read in a channels_last copy, which a launch before the kernel makes (COPYING)
    transposed: int = 0


class TileProblem(NamedTuple):
    """The properties of a call that the choice of a tile depends on."""

    spec: Spec
    channels: int  # of one group
    height: int  # cells
    width: int
    batch: int  # images times groups
    element_size: int  # bytes
    channels_last: bool  # the memory format of the tensors of the call
    x_align: int  # every run of source features begins and ends at a multiple of this number of elements
    y_align: int  # the same for target features
    capability: tuple[int, int]
    copied: bool = False  # whether the kernel reads the source features in a channels_last copy
    weighed: bool = False  # whether the kernel reads weights in the place of logits (banded/weighing.py)

    @property
    def x_last(self) -> bool:
        """Whether channels are the fastest axis of the source features, as the kernel reads them, and of their gradient."""
        return self.channels_last or self.copied


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


class Walk(NamedTuple):
    """The steps of a program of the gradient to the features: the targets of a step, and the tiles of sources that they read.

    The first tile of sources begins half a window above and to the left of the cells of the step, so that the sources that it shares with
    later steps lie in later tiles.
    """

    rows: int  # of sources, in a tile
    cols: int
    height: int  # of targets
    width: int
    lead: int  # columns of targets before those of the cells, which read the sources of the tile as well
    tiles: int  # of sources that the targets of a step read, one below the other
    s: int  # sources of a tile, as an axis of a product
    d: int  # targets of one product


class Walks(NamedTuple):
    """The division of a map among programs that walk."""

    walks: int  # one below the other
    across: int  # columns of walks
    down: int  # steps of a column of walks that complete sources
    visited: int  # all steps of a column of walks: those at the start of a walk belong to the one above it too
    columns: float  # of targets in the map, for a step


def as_read(kernel: KernelName, problem: TileProblem, tile: Tile) -> TileProblem:
    """Return the problem with the memory format and the alignments of the features that a kernel reads with this tile."""
    if kernel == "source_gradient":
        return problem._replace(weighed=not problem.channels_last)
    if not tile.transposed or problem.channels_last or kernel not in COPYING:
        return problem
    return problem._replace(copied=True, x_align=math.gcd(problem.channels, 16 // problem.element_size))


def run_vector(problem: TileProblem, tile: Tile, align: int) -> int:
    """Return the elements to whose multiple the extents of a tile are rounded along rows of features of this alignment."""
    return 1 if problem.x_last else min(tile.vector, align)


def run_alignments(problem: TileProblem, tile: Tile) -> tuple[int, int]:
    """Return the alignments of the source and of the target features that the kernels of the gradients use; forward uses the first."""
    if problem.x_last:
        return problem.x_align, problem.y_align
    return min(problem.x_align, tile.vector), min(problem.y_align, tile.vector)


def source_bytes(problem: TileProblem) -> int:
    """Return the bytes of the source features of a call, with the last cells whole."""
    return problem.batch * problem.channels * problem.height * problem.width * problem.spec.down**2 * problem.element_size


def share_in_map(problem: TileProblem, rows: int, cols: int) -> float:
    """Return the share of the cells of tiles of rows x cols that lie in the map."""
    return problem.height / multiple(problem.height, rows) * problem.width / multiple(problem.width, cols)


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


@lru_cache(maxsize=4096)
def walk(spec: Spec, cells_h: int, cells_w: int, vector: int, most_targets: int, *, alone: bool = False) -> Walk:
    """Return a step of `cells_h` x `cells_w` cells, with products of the most targets that leave few of their places empty.

    A walk that is alone in its rows of the map has no targets before its cells.
    """
    rows, cols = cells_h * spec.down, cells_w * spec.down
    lead = 0 if alone else multiple(spec.kernel_size // 2 * 2 * spec.up // spec.down, vector)
    tiles = -(-halo(spec, cells_h, cells_w).height // rows)
    height, width = cells_h * spec.up, lead + cells_w * spec.up
    d = most_targets
    while d > SMALLEST_EXTENT and multiple(height * width, d) > MOST_PADDING * height * width:
        d //= 2
    return Walk(rows, cols, height, width, lead, tiles, power_of_two(rows * cols), d)


def place_walk(problem: TileProblem, tile: Tile, vector: int, most_targets: int) -> Walk:
    """Return a step of programs that walk over a map."""
    alone = problem.width * problem.spec.down + problem.spec.kernel_size // 2 <= tile.cells_w * problem.spec.down
    return walk(problem.spec, tile.cells_h, tile.cells_w, vector, most_targets, alone=alone)


def count_walks(problem: TileProblem, tile: Tile, step: Walk) -> Walks:
    """Return the division of a map among programs that walk."""
    spec, radius = problem.spec, problem.spec.kernel_size // 2
    down = -(-(problem.height * spec.down + radius) // step.rows)
    across = -(-(problem.width * spec.down + radius) // step.cols)
    walks = -(-down // tile.steps)
    visited = down + sum(min(step.tiles - 1, n * tile.steps) for n in range(walks))
    starts = (n * tile.cells_w * spec.up - step.lead for n in range(across))
    columns = sum(max(0, min(start + step.width, problem.width * spec.up) - max(start, 0)) for start in starts)
    return Walks(walks, across, down, visited, columns / across)
