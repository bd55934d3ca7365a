"""Compile, emulate and check kernels of the operator with the installed Triton: `python -P -m triton_matrix TARGET CASE ...`.

A JSON line on standard output for each case says what came of it. docs/matrix.py (`make matrix`) calls this with every version of Triton.
Code for AMD GPUs is only compiled, because no emulator is at hand.
"""

import faulthandler
import json
import re
import sys
import warnings
from typing import NamedTuple

import torch
from carafepp.kernels.geometry import Spec
from operator_cases import TRITON_TOLERANCES

NCHW, NHWC = torch.contiguous_format, torch.channels_last
# name -> size of the features, options, dtype, layout
CASES = {
    "up 2, k 5, float16, channels_last": ((1, 64, 12, 16), Spec(5, up=2), torch.float16, NHWC),
    "up 2, k 5, float16, NCHW": ((1, 64, 12, 16), Spec(5, up=2), torch.float16, NCHW),
    "up 2, k 5, float32, channels_last": ((1, 64, 12, 16), Spec(5, up=2), torch.float32, NHWC),
    "down 2, k 5, bfloat16, channels_last": ((1, 64, 14, 18), Spec(5, down=2), torch.bfloat16, NHWC),
    "down 2, k 5, float32, NCHW": ((1, 64, 14, 18), Spec(5, down=2), torch.float32, NCHW),
    "up 3, k 7, 4 groups, float16, NCHW": ((1, 128, 6, 8), Spec(7, up=3, groups=4), torch.float16, NCHW),
    "up 3 / 2, k 3, sigmoids, renormalized, bfloat16": (
        (1, 20, 7, 9),
        Spec(3, up=3, down=2, normalizer="sigmoid_normalized", border="renormalize"),
        torch.bfloat16,
        NHWC,
    ),
    # reads pixels outside the map, tap by tap
    "up 2, k 3, shifted windows, float32": ((1, 20, 7, 9), Spec(3, up=2, border="shift"), torch.float32, NCHW),
}
# name -> capability for which PyTorch plans, lanes of a warp
NVIDIA = {"sm_80": (80, 32), "sm_90": (90, 32), "sm_100": (100, 32)}
AMD = {"gfx942": (94, 64), "gfx1100": (110, 32)}
# images that fill a device: their tiles are chosen, and one image is emulated
MANY = 64
# a compiler that takes longer is stuck
SECONDS = 600


class Row(NamedTuple):
    """What came of a case; numbers are None where compilation or emulation did not get to them."""

    case: str
    kernels: int = 0
    registers: int | None = None  # per thread, of the kernel with the most
    spills: int | None = None  # instructions on NVIDIA GPUs, registers on AMD GPUs
    shared: int | None = None  # bytes per block, of the kernel with the most
    error: float | None = None  # of y, dx or dlogits: the largest difference from float64 over the largest value
    equal: bool | None = None  # whether the error is within the tolerance of the dtype
    problem: str = ""


def check_nvidia(case: str, capability: int) -> Row:
    """Compile a case for an NVIDIA GPU, read the machine code, and emulate the kernels."""
    from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
    from ptx_step import emulate, training_step

    codes = []

    def run(launch, capability):
        codes.append(read_assembly(compile_launch(launch, capability)))
        return emulate(launch, capability)

    size, spec, dtype, layout = CASES[case]
    problem, error, equal = "", None, None
    try:
        errors = training_step(*size, spec, dtype, layout, capability=capability, images=MANY, run=run).errors
        # a NaN is where nothing was written
        error = max(errors.values(), key=lambda value: (value != value, value))
        equal = error < TRITON_TOLERANCES[dtype]
    except Exception as exception:
        problem = describe(exception)
    figures = ([code.registers for code in codes], [code.spills for code in codes], [code.shared for code in codes])
    registers, spills, shared = figures if codes else ((None,), (0,), (None,))
    return Row(case, len(codes), max(registers), sum(spills) if codes else None, max(shared), error, equal, problem)


def check_amd(case: str, target: str) -> Row:
    """Compile a case for an AMD GPU."""
    import triton
    from carafepp.kernels.gpu.tile_geometry import DIRECTIONS
    from carafepp.kernels.gpu.training_step import build_training_step
    from triton.backends.compiler import GPUTarget

    capability, lanes = AMD[target]
    (_, *size), spec, dtype, layout = CASES[case]
    codes, problem = [], ""
    try:
        step = build_training_step(MANY, *size, spec, dtype, layout)
        for launch in (launch for direction in DIRECTIONS for launch in step.build_launches(direction, capability=divmod(capability, 10))):
            code = triton.compile(launch.source(), target=GPUTarget("hip", target, lanes), options=launch.options)
            codes.append((*map(count_amd(code.asm["amdgcn"]), ("vgpr_count", "vgpr_spill_count")), code.metadata.shared))
            if not code.asm["hsaco"]:
                problem = "not linked: this Triton needs the linker of ROCm"
    except Exception as exception:
        problem = describe(exception)
    registers, spills, shared = zip(*codes, strict=True) if codes else ((None,), (0,), (None,))
    return Row(case, len(codes), max(registers), sum(spills) if codes else None, max(shared), problem=problem)


def count_amd(assembly: str):
    """Return a function that reads a figure of the compiler from its assembly."""
    return lambda name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])


def describe(exception: BaseException) -> str:
    """Name an exception and its first cause in one line."""
    while exception.__cause__ is not None:
        exception = exception.__cause__
    return f"{type(exception).__name__}: {' '.join(str(exception).split())}"[:300]


def main(target: str, cases: list[str]) -> None:
    """Print a line for every case."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if target in AMD:
        # the launches differ on ROCm
        torch.version.hip = torch.version.hip or "6.4"
    for case in cases:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        row = check_amd(case, target) if target in AMD else check_nvidia(case, NVIDIA[target][0])
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(row._asdict()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
