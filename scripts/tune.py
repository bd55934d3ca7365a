"""carafepp-tune: find the fastest tile of every kernel at the paper's sites, and store it for devices of this name."""

import importlib.util
import itertools
import time
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
    from ..kernels.gpu.residency import RESIDENCY_LIMITS
    from ..kernels.gpu.tile_geometry import DIRECTIONS
    from ..kernels.gpu.tile_tables import read_table, table_key, table_path
    from ..kernels.gpu.training_step import build_training_step
    from .common.sites import DTYPES, MEMORY_FORMATS, read_site

    options = read_options(cfg)
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
    bar = tqdm(list(itertools.product(sites.items(), dtypes, formats, DIRECTIONS)), unit="kernel")
    start, first = time.monotonic(), True
    seen = set()
    for (name, site), dtype, memory_format, direction in bar:
        shape, spec = read_site(site)
        step = build_training_step(*shape, spec, dtype, memory_format, "cuda" if gpu else "meta")
        key = table_key(direction, step.problem(None if gpu else divmod(capability, 10)))
        if key in seen or (gpu and not options["again"] and key in read_table(path).get(device, {})):
            continue
        seen.add(key)
        bar.set_postfix_str(f"{name} {direction}")
        if gpu:
            search = tile_search.time_tiles(step, direction, options["limit"])
        else:
            search = tile_search.count_instructions(step, direction, options["limit"], capability)
        found = sorted(search)
        if first and len(bar) > 1:
            first, seconds = False, time.monotonic() - start
            tqdm.write(f"the first kernel took {seconds:.0f} s: all {len(bar)} take about {format_duration(seconds * len(bar))}")
        if not found:
            tqdm.write(f"{key}: no tile fits")
            continue
        tqdm.write("\n".join([key, *(f"  {cost:10.4f} {'ms' if gpu else 'M'}  {tuple(tile)}" for cost, tile in found[: options["show"]])]))
        if gpu:
            store_tile(path, device, key, list(found[0][1]))


def choose_sites(sites: dict[str, Any], only: list[str] | None, gpu: bool) -> dict[str, Any]:
    """Return the sites to tune by name: those of `only`, or all, or without a GPU, where a kernel takes a minute, the first one.

    Raises:
        ValueError: a name is not that of a site.
    """
    names = only or [*sites][: None if gpu else 1]
    return dict(zip(names, look_up("only", names, sites), strict=True))


def format_duration(seconds: float) -> str:
    """Format a duration in the unit that suits it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def store_tile(path: Path, device: str, key: str, tile: list[int]) -> None:
    """Write the fastest tile of a kernel to the table, which other processes may also write."""
    from ..kernels.gpu.tile_tables import read_table, write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        table = read_table(path)
        table.setdefault(device, {})[key] = tile
        write_table(path, table)


if __name__ == "__main__":
    main()
