"""Print the bytes that the compiled kernels move between the multiprocessors and L2, as the emulator counts them, and predicted times.

Call: PYTHONPATH=tests/support python tests/kernels/gpu/ptx_traffic.py [WORD ...]

A row is one pass of the operator at one problem. The words choose the rows that contain them all. A row takes seconds to some minutes.
docs/performance_kernels.md has the table and explains the columns.
"""

import math
import sys
from typing import NamedTuple

import torch
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.launch import Launch
from carafepp.kernels.gpu.tiles.residency import RESIDENCY_LIMITS
from carafepp.kernels.gpu.tiles.time_model import find_device
from carafepp.kernels.gpu.training_step import TrainingStep, build_training_step
from fit_counted_time import Counts, fit_all, predict
from ptx import run
from ptx.bounds import GPUS

FORMATS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
DTYPES = {"float16": torch.float16, "float32": torch.float32}
PROBLEMS = {
    "512 RoIs of 256 x 14 x 14, up 2": (512, 256, 14, 14, Spec(5, up=2)),
    "2 x 256 x 100 x 168, up 2": (2, 256, 100, 168, Spec(5, up=2)),
    "4 x 512 x 64 x 64, up 2": (4, 512, 64, 64, Spec(5, up=2)),
    "64 x 64 x 112 x 112, down 2": (64, 64, 112, 112, Spec(5, down=2)),
    "1 x 128 x 33 x 47, up 3, k 7, 4 groups": (1, 128, 33, 47, Spec(7, up=3, groups=4)),
}
HEAD = ["problem", "data type", "memory format", "pass", "dy", "L2 / least", "registers", "occupancy", "spills", "us", "x copy"]
CAPABILITY = 90
DEVICE = find_device((9, 0))
# a device-to-device copy on an H200 with cold caches: microseconds without bytes, and bytes read and written in a microsecond. Such times
# are within 6 % of the measured copies of these problems
COPY_START, COPY_SPEED = 7.4, 4.46e6
# bytes of a sector, which L2 sends whole
SECTOR = 32
# pixels, times channels, of a larger image that the counted programs compute
ENOUGH = 2**24


class Traffic(NamedTuple):
    """What a launch moves and takes."""

    bytes: float  # between multiprocessors and L2, in the whole launch
    dy: float  # of them, of the gradient of the output
    registers: int
    spills: int
    occupancy: float
    microseconds: float  # predicted, of an H200


def count(launch: Launch, dy: torch.Tensor, images: int, size: int) -> Traffic:
    """Emulate whole images of a launch, or programs in the middle of one, which has `size` pixels times channels."""
    programs = math.prod(launch.grid)
    counted = math.ceil(programs / images * min(1, ENOUGH / size))
    first = (programs // images - counted) // 2
    compiled, parameters, blocks = compile_launch(launch, CAPABILITY), launch.parameters(), range(first, first + counted)
    code = read_assembly(compiled)
    shared, resident = compiled.metadata.shared, code.blocks
    found = run(compiled.asm["ptx"], launch.grid, parameters, shared=shared, blocks=blocks, gpu=GPUS[CAPABILITY], resident=resident)
    whole = programs / counted
    place = next((i for i, value in enumerate(parameters) if value is dy), None)
    buffers = list(found["per_buffer"].values())
    tensors = [i for i, value in enumerate(parameters) if isinstance(value, torch.Tensor)]
    read = buffers[tensors.index(place)].get("l2_sectors", 0) if place is not None else 0
    moved = found["l2_sectors_read"] + found["l2_sectors_write"]
    warps = min(code.occupancy * RESIDENCY_LIMITS[CAPABILITY].warps, programs * launch.num_warps / DEVICE.multiprocessors)
    copy = found["dram_bytes_compulsory"] * whole / DEVICE.copy * 1e-6
    time = predict(fit_all(), Counts(found["bound"]["issue"], found["bound"]["lsu"], copy, warps))
    return Traffic(moved * SECTOR * whole, read * SECTOR * whole, code.registers, code.spills, code.occupancy, time)


def row(problem: str, dtype: str, memory_format: str, direction: str) -> str:
    """Return a row of the table."""
    step: TrainingStep = build_training_step(*PROBLEMS[problem], DTYPES[dtype], FORMATS[memory_format], "cpu")
    launches = step.build_launches(direction, capability=divmod(CAPABILITY, 10))
    tensors = (step.x, step.logits, step.y) + ((step.x, step.logits) if direction == "backward" else ())
    least = sum(t.numel() * t.element_size() for t in tensors)
    images = len(step.x)
    counts = [count(launch, step.y, images, max(step.x.numel(), step.y.numel()) // images) for launch in launches]
    read = sum(found.dy for found in counts) / step.y.numel() / step.y.element_size()
    cells = [problem, dtype, memory_format, direction, f"{read:.1f}" if direction == "backward" else ""]
    cells.append(f"{sum(found.bytes for found in counts) / least:.1f}")
    cells.append(", ".join(str(found.registers) for found in counts))
    cells.append(", ".join(f"{100 * found.occupancy:.0f} %" for found in counts))
    cells.append(", ".join(str(found.spills) for found in counts))
    time = sum(found.microseconds for found in counts)
    cells.extend((f"{time:.0f}", f"{time / (COPY_START + least / COPY_SPEED):.1f}"))
    return "| " + " | ".join(cells) + " |"


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for problem in PROBLEMS:
        for dtype in DTYPES:
            for memory_format in FORMATS:
                for direction in ("forward", "backward"):
                    if all(word in (problem, dtype, memory_format, direction) or word in problem for word in words):
                        print(row(problem, dtype, memory_format, direction), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
