"""carafepp-inspect: compile every kernel for GPUs that need not be there, and print what the assembler made of it."""

import importlib.util
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from ..kernels.geometry import Spec, check_spec
from .common.app import app
from .common.choices import DTYPES, MEMORY_FORMATS, look_up


def variants(cfg: dict, capability: int) -> Iterator[tuple[dict, object]]:
    """Yield every kernel of the sites once, with what it is for."""
    from ..kernels.gpu.tile_geometry import DIRECTIONS
    from ..kernels.gpu.training_step import build_training_step

    seen = set()
    dtypes = look_up("dtypes", cfg["dtypes"], DTYPES)
    formats = look_up("memory_formats", cfg["memory_formats"], MEMORY_FORMATS)
    for (site, options), dtype, memory_format, normalizer in itertools.product(cfg["sites"].items(), dtypes, formats, cfg["normalizers"]):
        size = [options[name] for name in ("n", "channels", "height", "width")]
        spec = Spec(**{name: value for name, value in options.items() if name in Spec._fields}, normalizer=normalizer)
        check_spec(spec)
        step = build_training_step(*size, spec, dtype, memory_format)
        for launch in (x for direction in DIRECTIONS for x in step.build_launches(direction, capability=divmod(capability, 10))):
            key = (launch.source().hash(), launch.num_warps, launch.num_stages)
            if key not in seen:
                seen.add(key)
                name = next(n for n, f in MEMORY_FORMATS.items() if f == memory_format)
                labels = {"site": site, "dtype": str(dtype).removeprefix("torch."), "memory_format": name, "normalizer": normalizer}
                yield labels | {"kernel": launch.kernel.__name__, "architecture": f"sm_{capability}"}, launch


def table(rows: list[dict]) -> str:
    """Rows as aligned text."""
    heads = [name.replace("_", " ") for name in rows[0]]
    lines = [heads] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value) -> str:
    if isinstance(value, dict):
        return " ".join(f"{count} {name}" for name, count in value.items()) or "-"
    return f"{value:.0%}" if isinstance(value, float) else str(value)


@app("inspect")
def main(cfg: DictConfig) -> None:
    """Compile, print, and exit with 1 if a kernel spills."""
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("carafepp-inspect needs the triton package, which is not installed (pip install triton; Linux only)")
    from ..kernels.gpu.assembly import RESIDENCY_LIMITS, compile_launch, read_assembly

    options = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    capabilities = look_up("architectures", options["architectures"], {f"sm_{number}": number for number in RESIDENCY_LIMITS})
    work = [(capability, *variant) for capability in capabilities for variant in variants(options, capability)]

    def assemble(job) -> dict:
        capability, labels, launch = job
        return labels | read_assembly(compile_launch(launch, capability))._asdict()

    # the compiler leaves the interpreter lock for most of its work
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(assemble, work), total=len(work), unit="kernel"))
    print(table(rows))
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(rows, indent=1) + "\n")
    spilled = [row for row in rows if row["spills"]]
    if spilled:
        raise SystemExit(f"{len(spilled)} of {len(rows)} kernels spill registers:\n{table(spilled)}")


if __name__ == "__main__":
    main()
