"""carafepp-tune: find the fastest tile of every kernel at the paper's sites, and keep it for this kind of device."""

import importlib.util
import itertools

import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from ..kernels.geometry import Spec, check_spec
from ..kernels.gpu.tile_geometry import DIRECTIONS
from ..kernels.gpu.tile_tables import read_table, table_key, table_path, write_table
from .common.app import app
from .common.choices import DTYPES, MEMORY_FORMATS, look_up


@app("tune")
def main(cfg: DictConfig) -> None:
    """Time the tiles of every site that the table does not have yet; without a GPU, rank them by their compiled code."""
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("carafepp-tune needs the triton package, which is not installed (pip install triton; Linux only)")
    from ..kernels.gpu import tile_search
    from ..kernels.gpu.training_step import build_training_step

    options = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    dtypes = look_up("dtypes", options["dtypes"], DTYPES)
    formats = look_up("memory_formats", options["memory_formats"], MEMORY_FORMATS)
    (capability,) = look_up("architecture", [options["architecture"]], {f"sm_{number}": number for number in tuning_architectures()})
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else None
    path = table_path()
    if gpu:
        print(f"{device}: timing tiles; the table is {path}")
    else:
        print(f"no GPU: ranking tiles compiled for {options['architecture']} by millions of warp instructions; no table is written")
    work = list(itertools.product(options["sites"].items(), dtypes, formats, DIRECTIONS))
    bar = tqdm(work, unit="kernel")
    seen = set()
    for (name, size), dtype, memory_format, direction in bar:
        size = dict(size)
        shape = [size.pop(axis) for axis in ("n", "channels", "height", "width")]
        spec = Spec(**size)
        check_spec(spec)
        step = build_training_step(*shape, spec, dtype, memory_format, "cuda" if gpu else "meta")
        key = table_key(direction, step.problem(None if gpu else divmod(capability, 10)))
        if key in seen or (gpu and not options["again"] and key in read_table(path).get(device, {})):
            continue
        seen.add(key)
        bar.set_postfix_str(f"{name} {direction}")
        search = (
            tile_search.time_tiles(step, direction, options["limit"])
            if gpu
            else tile_search.count_instructions(step, direction, options["limit"], capability)
        )
        found = sorted(search)
        if not found:
            tqdm.write(f"{key}: no tile fits")
            continue
        tqdm.write("\n".join([key, *(f"  {cost:10.4f} {'ms' if gpu else 'M'}  {tuple(tile)}" for cost, tile in found[: options["show"]])]))
        if gpu:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                table = read_table(path)
                table.setdefault(device, {})[key] = list(found[0][1])
                write_table(path, table)


def tuning_architectures() -> tuple[int, ...]:
    """Compute capabilities that tiles can be ranked for without a GPU."""
    from ..kernels.gpu.assembly import RESIDENCY_LIMITS

    return tuple(RESIDENCY_LIMITS)


if __name__ == "__main__":
    main()
