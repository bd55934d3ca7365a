"""The tables of measured tiles: what `carafepp-tune` writes for a device and the launchers prefer to the model of tiles.py.

The user's table is a JSON file {device name: {key: tile}}, in the cache folder or where CARAFEPP_TILES says. Where it has nothing,
measured_tiles.json, {architecture: {key: tile}}, has what a run of carafepp-tune found on one GPU of that architecture: sm_90 on an H200.
"""

import json
import os
from functools import cache
from pathlib import Path

import torch

from .tile_geometry import Tile
from .tiles import Problem

PASSES = ("forward", "backward")
SHIPPED = Path(__file__).with_name("measured_tiles.json")


def table_path() -> Path:
    """Where the table is: CARAFEPP_TILES, or carafepp/tiles.json in the user's cache folder."""
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CARAFEPP_TILES") or Path(cache_folder) / "carafepp" / "tiles.json")


def key(name: str, problem: Problem) -> str:
    """Problems that share a measured tile: the size of the maps counts by powers of two only."""
    spec = problem.spec
    scale = f"k{spec.kernel_size} up{spec.up} down{spec.down} c{problem.channels}"
    layout = "channels_last" if problem.channels_last else f"nchw align{problem.x_align}"
    area = (problem.batch * problem.height * problem.width).bit_length()
    return f"{name} {scale} bytes{problem.element_size} {layout} area2^{area}"


def read(path: Path) -> dict[str, dict[str, list[int]]]:
    """The table at `path`, empty where there is none.

    Raises:
        ValueError: the file is no such table.
    """
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())
        for tiles in table.values():
            for tile in tiles.values():
                Tile(*tile)
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no table of tiles ({error}); delete it or run carafepp-tune again") from error
    return table


def write(path: Path, table: dict[str, dict[str, list[int]]]) -> None:
    """Replace the table at `path` in one step, so that an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


@cache
def _loaded() -> dict[str, dict[str, list[int]]]:
    return read(table_path())


@cache
def _shipped() -> dict[str, dict[str, list[int]]]:
    # ROCm numbers its devices as if they were NVIDIA's
    return {} if torch.version.hip else read(SHIPPED)


@cache
def tile(name: str, problem: Problem, device: str) -> Tile | None:
    """The measured tile of a pass ("forward" or "backward") on a device of this name, or None. The tables are read once in a process."""
    for measured in (_loaded().get(device, {}), _shipped().get("sm_{}{}".format(*problem.capability), {})):
        if found := measured.get(key(name, problem)):
            return Tile(*found)
    return None
