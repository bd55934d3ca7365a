"""carafepp-tune: find the fastest tile of every kernel at the paper's sites, and store it for devices of this name."""

import importlib.util
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig
from tqdm import tqdm

from .common.app import app
from .common.options import look_up, read_options


@app("tune")
def main(cfg: DictConfig) -> None:
    """Time the tiles of every kernel that the table lacks; without a GPU, rank the tiles by their compiled code."""
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("carafepp-tune needs the triton package, which is not installed (pip install triton; Linux only)")
    import torch

    from ..kernels.gpu import tile_search
    from ..kernels.gpu.operator_launches import has_tiles
    from ..kernels.gpu.tiles.geometry import DIRECTIONS, KernelName, Tile
    from ..kernels.gpu.tiles.ranking import SEPARATE, TOGETHER
    from ..kernels.gpu.tiles.residency import RESIDENCY_LIMITS
    from ..kernels.gpu.tiles.tables import read_table, table_key, table_path
    from ..kernels.gpu.training_step import build_training_step
    from .common.sites import DTYPES, MEMORY_FORMATS, read_site

    options = read_options(cfg)
    if options["merge"] is not None:
        print(merge_tables(table_path(), options["merge"]))
        return
    dtypes = look_up("dtypes", options["dtypes"], DTYPES)
    formats = look_up("memory_formats", options["memory_formats"], MEMORY_FORMATS)
    (capability,) = look_up("architecture", [options["architecture"]], {f"sm_{number}": number for number in RESIDENCY_LIMITS})
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else ""
    path = table_path()
    if gpu:
        print(f"{device}: timing tiles; the table is {path}")
    else:
        print(f"no GPU: ranking tiles compiled for {options['architecture']} by millions of warp instructions; no table is written")
    sites = choose_sites(options["sites"], options["only"], gpu)
    bar = tqdm(list(itertools.product(sites.items(), dtypes, formats, DIRECTIONS)), unit="pass")
    start, first = time.monotonic(), True
    seen = set()
    for (name, site), dtype, memory_format, direction in bar:
        shape, spec = read_site(site)
        step = build_training_step(*shape, spec, dtype, memory_format, "cuda" if gpu else "meta")
        problem = step.problem(None if gpu else divmod(capability, 10))
        # the kernels of the pass that have tiles, in each of the ways in which it can be launched
        apart: tuple[KernelName, ...] = ("forward",) if direction == "forward" else SEPARATE
        ways: list[tuple[KernelName, ...]] = [tuple(kernel for kernel in apart if has_tiles(kernel, problem))]
        if ways == [SEPARATE]:
            ways = [TOGETHER, SEPARATE]
        if not ways[0]:
            continue
        known = read_table(path).get(device, {}) if gpu and not options["again"] else {}
        if table_key(direction, problem) in seen or any(all(table_key(kernel, problem) in known for kernel in way) for way in ways):
            continue
        seen.add(table_key(direction, problem))
        best: dict[KernelName, tuple[float, Tile]] = {}
        for kernel in itertools.chain(*ways):
            bar.set_postfix_str(f"{name} {kernel}")
            if gpu:
                found, skipped = tile_search.time_tiles(step, kernel, options["limit"], options["patience"])
            else:
                found, skipped = sorted(tile_search.count_instructions(step, kernel, options["limit"], capability)), {}
            tqdm.write("\n".join(describe_search(table_key(kernel, problem), found, skipped, options["show"], "ms" if gpu else "M")))
            if found:
                best[kernel] = found[0]
        if first and len(bar) > 1:
            first, seconds = False, time.monotonic() - start
            tqdm.write(f"the first pass took {seconds:.0f} s: all {len(bar)} take about {format_duration(seconds * len(bar))}")
        ways = [way for way in ways if all(kernel in best for kernel in way)]
        if gpu and ways:
            fastest = min(ways, key=lambda way: sum(best[kernel][0] for kernel in way))
            store_tiles(path, device, {table_key(kernel, problem): list(best[kernel][1]) for kernel in fastest})


def describe_search(key: str, found: Sequence[tuple[float, Sequence[int]]], skipped: Mapping[str, int], show: int, unit: str) -> list[str]:
    """Return the lines that tell the first tiles of a search with their costs, and the tiles that it has skipped."""
    if not found and not skipped:
        return [f"{key}: no tile fits"]
    total = len(found) + sum(skipped.values())
    return [
        key,
        *(f"  {cost:10.4f} {unit}  {tuple(tile)}" for cost, tile in found[:show]),
        *(f"  skipped {count} of {total} tiles: {reason}" for reason, count in skipped.items()),
    ]


def choose_sites(sites: dict[str, Any], only: list[str] | None, gpu: bool) -> dict[str, Any]:
    """Return the sites to tune by name: those of `only`, or all, or without a GPU, where a kernel takes a minute, the first one.

    Raises:
        ValueError: a name is not that of a site.
    """
    names = [*sites][: None if gpu else 1] if only is None else only
    return dict(zip(names, look_up("only", names, sites), strict=True))


def format_duration(seconds: float) -> str:
    """Format a duration in the unit that suits it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def store_tiles(path: Path, device: str, tiles: dict[str, list[int]]) -> None:
    """Write the fastest tiles of kernels to the table, which other processes may also write."""
    from ..kernels.gpu.tiles.tables import read_table, write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        table = read_table(path)
        table[device] = table.get(device, {}) | tiles
        write_table(path, table)


def merge_tables(path: Path, others: Sequence[str | Path]) -> str:
    """Add the tiles of other tables to the table at `path`, which keeps its own where both have one, and say what was added.

    Raises:
        FileNotFoundError: one of the other tables does not exist.
        ValueError: a file is not a table of tiles, or no list of files is given.
    """
    from ..kernels.gpu.tiles.tables import read_table, write_table

    if isinstance(others, str) or not others:
        raise ValueError(f"merge must be a list of one or more tables of carafepp-tune, such as [tiles.json], got {others}")
    for other in map(Path, others):
        if not other.is_file():
            raise FileNotFoundError(f"merge must name tables of carafepp-tune, and {other} does not exist")
    tables = [read_table(Path(other)) for other in others]
    path.parent.mkdir(parents=True, exist_ok=True)
    added = 0
    with FileLock(f"{path}.lock"):
        merged = read_table(path)
        for device, tiles in (item for table in tables for item in table.items()):
            known = merged.setdefault(device, {})
            added += len(tiles.keys() - known.keys())
            merged[device] = tiles | known
        write_table(path, merged)
    return f"{path} has {added} more tiles, and {sum(map(len, merged.values()))} in all, of {len(merged)} devices"


if __name__ == "__main__":
    main()
