"""carafepp-inspect: compile every kernel for GPUs that need not be present, and report on the machine code."""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig
from tqdm import tqdm

from ..tasks.writing import write_atomically
from .common.app import app
from .common.options import look_up, read_options

if TYPE_CHECKING:
    from ..kernels.gpu.launch import Launch
    from ..kernels.gpu.tiles.geometry import KernelName, TileProblem

LABELS = ("site", "dtype", "memory_format", "normalizer", "kernel", "architecture")

# names of kernels by whether they need the gradients to the features and to the logits
NAMES: "dict[tuple[bool | None, bool | None], KernelName]" = {
    (None, None): "forward",
    (True, True): "backward",
    (False, True): "logit_gradient",
    (True, False): "source_gradient",
}

# headings in a narrow terminal
SHORT = {"registers": "regs", "occupancy": "occ.", "widest load": "load", "widest store": "store", "barriers": "bars"}
SHORT |= {"instructions": "instr.", "predicted us": "us"}


class Kernel(NamedTuple):
    """A kernel to compile, and the first call that launches it."""

    labels: dict[str, str]
    launch: "Launch"
    problem: "TileProblem"
    capability: int


def find_kernels(options: Mapping[str, Any], capability: int) -> Iterator[Kernel]:
    """Yield every distinct kernel that the operator launches at the sites."""
    from ..kernels.gpu.tiles.geometry import DIRECTIONS
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
        pair = divmod(capability, 10)
        problem = step.problem(pair)
        for launch in (launch for direction in DIRECTIONS for launch in step.build_launches(direction, capability=pair)):
            key = (launch.source().hash(), *launch.options.values())
            if key not in seen:
                seen.add(key)
                where = (site, dtype, memory_format, normalizer, launch.kernel.__name__, f"sm_{capability}")
                yield Kernel(dict(zip(LABELS, where, strict=True)), launch, problem, capability)


def read_figures(launch: "Launch", capability: int) -> dict[str, Any]:
    """Compile a kernel and read its code, or read the figures that an earlier call has stored in the user's cache folder."""
    import triton

    from ..kernels.cpu.build import cache_directory
    from ..kernels.gpu import assembly
    from ..kernels.gpu.tiles import residency

    # the source, its compiler, and the code that reads the result
    readers = [Path(path).read_text() for path in (assembly.__file__, residency.__file__)]
    told = (launch.source().hash(), launch.options, capability, triton.__version__, readers)
    path = cache_directory() / "inspect" / f"{hashlib.sha256(repr(told).encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return assembly.Assembly(**json.loads(path.read_text()))._asdict()
    figures = assembly.read_assembly(assembly.compile_launch(launch, capability))._asdict()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(figures))
    return figures


def predict_microseconds(kernel: Kernel, figures: Mapping[str, Any]) -> int | None:
    """Return the microseconds of a compiled kernel at its site by the model of time; None for the kernels that have no tile."""
    from ..kernels.gpu.tiles.resources import Resources
    from ..kernels.gpu.tiles.time_model import estimate_time

    tile = kernel.launch.constants.get("TILE")
    if tile is None:
        return None
    resources = Resources(figures["registers"], figures["shared"])
    return round(estimate_time(name_of(kernel), kernel.problem, tile, resources).total)


def has_listed_tile(kernel: Kernel) -> bool:
    """Return whether the tile of a kernel is from a table."""
    from ..kernels.gpu.tiles.tables import find_in_tables

    tile = kernel.launch.constants.get("TILE")
    return tile is not None and tile == find_in_tables(name_of(kernel), kernel.problem, "meta")


def name_of(kernel: Kernel) -> "KernelName":
    """Return the name of a kernel that has a tile."""
    if "WALK" in kernel.launch.constants:
        return "source_gradient"
    return NAMES[kernel.launch.constants.get("NEED_DX"), kernel.launch.constants.get("NEED_DLOGITS")]


def format_table(rows: list[dict], width: int) -> str:
    """Format rows with the same keys as aligned columns; in a narrow terminal, the figures of a kernel are below its labels."""
    cells: list[list[str]] = [
        [name.replace("_", " ") for name in rows[0]],
        *([format_value(value) for value in row.values()] for row in rows),
    ]
    whole = align(cells)
    if max(map(len, whole)) <= width:
        return "\n".join(whole)
    labels = [", ".join(line[: len(LABELS)]) for line in cells]
    heads, *figures = [line[len(LABELS) :] for line in cells]
    lines = align([*stack_words([SHORT.get(head, head) for head in heads]), *figures], gap=1)
    heads, figures = lines[: -len(rows)], lines[-len(rows) :]
    kernels = (f"{label}\n {figure}" for label, figure in zip(labels[1:], figures, strict=True))
    return "\n".join([labels[0], *(f" {line}" for line in heads), *kernels])


def align(cells: list[list[str]], gap: int = 2) -> list[str]:
    """Pad the cells of every column to one width, with `gap` spaces between columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [(" " * gap).join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def stack_words(head: list[str]) -> list[list[str]]:
    """Put the words of every heading below each other, in as many lines as the longest needs."""
    words = [cell.split() for cell in head]
    tall = max(map(len, words))
    return [[*line] for line in zip(*([""] * (tall - len(cell)) + cell for cell in words), strict=True)]


def format_value(value: object) -> str:
    """Format a count, a share (in per cent) or the counts of several instructions."""
    if isinstance(value, dict):
        return " ".join(f"{count} {name}" for name, count in value.items()) or "-"
    if value is None:
        return "-"
    return f"{value:.0%}" if isinstance(value, float) else str(value)


@app("inspect")
def main(cfg: DictConfig) -> None:
    """Compile the kernels and print a table; exit with status 1 if one spills registers in a loop and its tile is in no table."""
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("carafepp-inspect needs the triton package, which is not installed (pip install triton; Linux only)")
    from ..kernels.gpu.tiles.residency import RESIDENCY_LIMITS

    options = read_options(cfg)
    capabilities = look_up("architectures", options["architectures"], {f"sm_{number}": number for number in RESIDENCY_LIMITS})
    work = [kernel for capability in capabilities for kernel in find_kernels(options, capability)]

    def assemble(kernel: Kernel) -> dict:
        figures = read_figures(kernel.launch, kernel.capability)
        return kernel.labels | figures | {"predicted_us": predict_microseconds(kernel, figures)}

    # the compiler releases the interpreter lock during most of its work
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(assemble, work), total=len(work), unit="kernel"))
    # a file or another program gets one line for each kernel
    width = shutil.get_terminal_size((10_000, 24)).columns
    # the spills in loops are in the file
    printed = [{name: value for name, value in row.items() if name != "loop_spills"} for row in rows]
    print(format_table(printed, width))
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(rows, indent=1) + "\n")
    # a tile in a table is the fastest even if it spills
    in_loops = [row["loop_spills"] and not has_listed_tile(kernel) for kernel, row in zip(work, rows, strict=True)]
    spilled = [row for row, spills in zip(printed, in_loops, strict=True) if spills]
    if spilled:
        raise SystemExit(f"{len(spilled)} of {len(rows)} kernels spill registers in a loop:\n{format_table(spilled, width)}")


if __name__ == "__main__":
    main()
