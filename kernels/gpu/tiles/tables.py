"""The tables of tiles, which take precedence over the choice of ranking.py.

`carafepp-tune` writes the user's table, a JSON file {device name: {key: tile}} in the cache folder or at the path in CARAFEPP_TILES. The
shipped tables, {architecture: {key: tile}}, serve keys that the user's table lacks:

- measured_tiles.json: its tiles for sm_90 were measured on an H200. A tile that spills registers is in the table if it was at least 10 %
  faster than every tile that does not.
- counted_tiles.json: no GPU has timed its tiles. An emulator counts half of the traffic of the best measured tile of an earlier kernel, and
  the model of time predicts the same time.

The key of a tile begins with the name of its kernel. It may end with the height and the width of the map in cells, and is then that of this
size alone.
"""

import json
import os
from functools import cache
from pathlib import Path

import torch

from .geometry import KERNELS, KernelName, Tile, TileProblem

SHIPPED_TABLES = tuple(Path(__file__).with_name(name) for name in ("measured_tiles.json", "counted_tiles.json"))

Table = dict[str, dict[str, list[int]]]


def table_path() -> Path:
    """Return the path of the user's table: CARAFEPP_TILES, or carafepp/tiles.json in the user's cache folder."""
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CARAFEPP_TILES") or Path(cache_folder) / "carafepp" / "tiles.json")


def table_key(kernel: KernelName, problem: TileProblem) -> str:
    """Return the key of a kernel. Problems share a key, and therefore a tile, if they differ only in an area in one power of two."""
    spec = problem.spec
    scale = f"k{spec.kernel_size} up{spec.up} down{spec.down} c{problem.channels}"
    layout = "channels_last" if problem.channels_last else f"nchw align{problem.x_align}"
    area = (problem.batch * problem.height * problem.width).bit_length()
    return f"{kernel} {scale} bytes{problem.element_size} {layout} area2^{area}"


def read_table(path: Path) -> Table:
    """Return the table at `path`, empty if the file does not exist.

    Raises:
        ValueError: if the file is not a table of tiles.
    """
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_bytes())
        for tiles in table.values():
            for tile in tiles.values():
                *sizes, transposed = Tile(*tile)
                if not all(type(value) is int and value >= 1 for value in sizes) or type(transposed) is not int or transposed not in (0, 1):
                    raise TypeError(f"a tile is made of integers of at least 1, and of 0 or 1 as the last of ten, got {tile}")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a table of tiles ({error}); delete it or run carafepp-tune again") from error
    return table


def write_table(path: Path, table: Table) -> None:
    """Replace the table at `path` in one step, so that an interruption leaves either the old or the new table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


# a process reads each table once
load_table = cache(read_table)


def list_tiles(problem: TileProblem, device_name: str) -> list[dict[KernelName, Tile]]:
    """Return the tiles that each table has for the kernels of a problem on a device of this name; the user's table is the first."""
    tables = [load_table(table_path()).get(device_name, {})]
    # ROCm numbers its devices as NVIDIA does, but the shipped tiles are for NVIDIA's
    if not torch.version.hip:
        architecture = "sm_{}{}".format(*problem.capability)
        tables += [load_table(path).get(architecture, {}) for path in SHIPPED_TABLES]
    keys, size = {kernel: table_key(kernel, problem) for kernel in KERNELS}, f" {problem.height}x{problem.width}"
    found = []
    for table in tables:
        tiles = {kernel: table.get(key + size) or table.get(key) for kernel, key in keys.items()}
        found.append({kernel: Tile(*tile) for kernel, tile in tiles.items() if tile})
    return found


def find_in_tables(kernel: KernelName, problem: TileProblem, device_name: str) -> Tile | None:
    """Return the tile of a kernel in the first table that has one, or None if none of them has it."""
    return next((tiles[kernel] for tiles in list_tiles(problem, device_name) if kernel in tiles), None)


def find_kernels(choices: tuple[tuple[KernelName, ...], ...], problem: TileProblem, device_name: str) -> tuple[KernelName, ...] | None:
    """Return the first choice of kernels of which one table has all tiles, or None; an earlier table goes before an earlier choice."""
    for tiles in list_tiles(problem, device_name):
        for kernels in choices:
            if all(kernel in tiles for kernel in kernels):
                return kernels
    return None
