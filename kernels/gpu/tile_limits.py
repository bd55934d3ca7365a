"""Which tiles fit a GPU: registers and shared memory, and the shapes of the products that its matrix units take."""

from typing import NamedTuple

from .tile_geometry import Tile, TileProblem, power_of_two


class SourceBlocks(NamedTuple):
    """The extents of one product of the gradient to the sources."""

    channels: int
    targets: int  # of those that read the sources of the tile


def source_blocks(problem: TileProblem, tile: Tile) -> SourceBlocks:
    """Channels and reaching targets of one product of the gradient to the sources: all channels of a program if they fit."""
    # the newer matrix units leave room for fewer, and no more than four programs share them
    newer = problem.capability >= ((9, 0) if problem.element_size == 4 else (10, 0))
    room = 256 // problem.element_size if newer else 256
    most = room if problem.channels > 4 * room else 256
    channels = min(most, power_of_two(-(-problem.channels // tile.split)))
    return SourceBlocks(channels, max(16, min(128 // problem.element_size, 256 * tile.block_c // channels)))
