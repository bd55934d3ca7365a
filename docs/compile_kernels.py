"""Compiles the kernels of the operator for maps and data types, on all cores, into the cache from which later processes take them.

`python docs/compile_kernels.py OP SHAPE[,SHAPE ...] ...`, such as: up2 [1,256,50,76],[512,256,14,14] down2 [64,64,112,112]
"""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
import yaml
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tiles.geometry import DIRECTIONS, Direction
from carafepp.kernels.gpu.training_step import build_training_step

OPS = Path(__file__).parent.parent / "conf" / "op"
DTYPES = torch.float16, torch.float32
FORMATS = torch.channels_last, torch.contiguous_format
Case = tuple[str, tuple[int, ...], torch.dtype, torch.memory_format, Direction]


def list_cases(words: list[str]) -> Iterator[Case]:
    """Yield every pass over the named maps."""
    for op, shapes in zip(words[::2], words[1::2], strict=True):
        for shape in json.loads(f"[{shapes}]"):
            for options in itertools.product(DTYPES, FORMATS, DIRECTIONS):
                yield op, tuple(shape), *options


def compile_case(case: Case) -> int:
    """Compile the kernels of a pass for the GPU of this machine, and return their number."""
    op, shape, dtype, memory_format, direction = case
    settings = yaml.safe_load((OPS / f"{op}.yaml").read_text())
    n, c, h, w = shape
    step = build_training_step(n, c, h, w, Spec(**{name: settings[name] for name in Spec._fields}), dtype, memory_format)
    launches = step.build_launches(direction, capability=torch.cuda.get_device_capability())
    for launch in launches:
        triton.compile(launch.source(), options=launch.options)
    return len(launches)


if __name__ == "__main__":
    # processes, because Triton compiles much of a kernel in Python
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        print(f"{sum(pool.map(compile_case, list_cases(sys.argv[1:])))} kernels compiled")
