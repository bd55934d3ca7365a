"""carafepp-inspect: compile every kernel for GPUs that need not be present, and report on the machine code."""

import importlib.util
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from tqdm import tqdm

from .common.app import app
from .common.options import look_up, read_options

if TYPE_CHECKING:
    from ..kernels.gpu.launch import Launch


def find_kernels(options: Mapping[str, Any], capability: int) -> Iterator[tuple[dict[str, str], "Launch"]]:
    """Yield every distinct kernel that the operator launches at the sites, with the first site and options that launch it."""
    from ..kernels.gpu.tile_geometry import DIRECTIONS
    from ..kernels.gpu.training_step import build_training_step
    from .common.sites import DTYPES, MEMORY_FORMATS, read_site

    seen = set()
    dtypes = dict(zip(options["dtypes"], look_up("dtypes", options["dtypes"], DTYPES), strict=True))
    formats = dict(zip(options["memory_formats"], look_up("memory_formats", options["memory_formats"], MEMORY_FORMATS), strict=True))
    for (site, size), dtype, memory_format, normalizer in itertools.product(
        options["sites"].items(), dtypes, formats, options["normalizers"]
    ):
        shape, spec = read_site(size, normalizer=normalizer)
        step = build_training_step(*shape, spec, dtypes[dtype], formats[memory_format])
        for launch in (x for direction in DIRECTIONS for x in step.build_launches(direction, capability=divmod(capability, 10))):
            key = (launch.source().hash(), launch.num_warps, launch.num_stages)
            if key not in seen:
                seen.add(key)
                labels = {"site": site, "dtype": dtype, "memory_format": memory_format, "normalizer": normalizer}
                yield labels | {"kernel": launch.kernel.__name__, "architecture": f"sm_{capability}"}, launch


def format_table(rows: list[dict]) -> str:
    """Format rows with the same keys as aligned columns."""
    heads = [name.replace("_", " ") for name in rows[0]]
    lines = [heads] + [[format_value(value) for value in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def format_value(value: object) -> str:
    """Format a count, a share (in per cent) or the counts of several instructions."""
    if isinstance(value, dict):
        return " ".join(f"{count} {name}" for name, count in value.items()) or "-"
    return f"{value:.0%}" if isinstance(value, float) else str(value)


@app("inspect")
def main(cfg: DictConfig) -> None:
    """Compile the kernels and print a table; exit with status 1 if a kernel spills registers."""
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("carafepp-inspect needs the triton package, which is not installed (pip install triton; Linux only)")
    from ..kernels.gpu.assembly import RESIDENCY_LIMITS, compile_launch, read_assembly

    options = read_options(cfg)
    capabilities = look_up("architectures", options["architectures"], {f"sm_{number}": number for number in RESIDENCY_LIMITS})
    work = [(capability, *kernel) for capability in capabilities for kernel in find_kernels(options, capability)]

    def assemble(job: tuple[int, dict[str, str], "Launch"]) -> dict:
        capability, labels, launch = job
        return labels | read_assembly(compile_launch(launch, capability))._asdict()

    # the compiler releases the interpreter lock during most of its work
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(assemble, work), total=len(work), unit="kernel"))
    print(format_table(rows))
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(rows, indent=1) + "\n")
    spilled = [row for row in rows if row["spills"]]
    if spilled:
        raise SystemExit(f"{len(spilled)} of {len(rows)} kernels spill registers:\n{format_table(spilled)}")


if __name__ == "__main__":
    main()
