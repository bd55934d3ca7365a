"""The ranking of tiles by speed: a pure function of the shape, data type and memory format of a problem and the capability of the device.

The tiles that fit (tile_limits.py) are ranked by their predicted time (tile_time.py). A measured tile (tile_tables.py) takes precedence.
"""

from functools import lru_cache

from .tile_geometry import Direction, Tile, TileProblem
from .tile_limits import fitting_tiles
from .tile_time import estimate_time


@lru_cache(maxsize=4096)
def rank_tiles(direction: Direction, problem: TileProblem) -> tuple[Tile, ...]:
    """Return the tiles that fit a pass, the fastest by the model first; none if the window is too large."""
    times = {tile: estimate_time(direction, problem, tile).total for tile in fitting_tiles(direction, problem)}
    return tuple(sorted(times, key=lambda tile: (times[tile], tile)))


def choose_tile(direction: Direction, problem: TileProblem) -> Tile | None:
    """Return the first tile of the ranking, or None if the window is too large for the banded kernel."""
    tiles = rank_tiles(direction, problem)
    return tiles[0] if tiles else None
