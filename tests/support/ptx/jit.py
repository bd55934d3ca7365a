"""From a Triton kernel to an emulated launch: compile as a real launch would specialise it, then run."""

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .bounds import GPUS
from .execute import run

POINTERS = {
    **{"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float64": "*fp64"},
    **{"int8": "*i8", "int32": "*i32", "int64": "*i64", "bool": "*i1"},
}


def launch(kernel, grid, *args, num_warps: int = 4, num_stages: int = 2, capability: int = 80, **constants) -> dict:
    """Run `kernel[grid](*args, **constants)` under the emulator and return what it counts.

    Args:
        args: CPU tensors (bases count as aligned), arrays and numbers, in the order of the parameters that are not constants.
    """
    names = [name for name in kernel.arg_names if name not in constants]
    given = dict(zip(names, args, strict=True))
    ones = {name: 1 for name, value in given.items() if isinstance(value, int) and value == 1}
    constants = constants | ones
    given = {name: value for name, value in given.items() if name not in ones}
    signature = {name: _type(given[name]) if name in given else "constexpr" for name in kernel.arg_names}
    aligned = [name for name, value in given.items() if not isinstance(value, float) and (not isinstance(value, int) or value % 16 == 0)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return execute(source, {"num_warps": num_warps, "num_stages": num_stages}, grid, list(given.values()), capability=capability)


def execute(source: ASTSource, options: dict, grid, args: list, *, capability: int = 80) -> dict:
    """Compile a specialised kernel for sm_80, sm_90 or sm_100 and run it on `args`, those that the compiled code takes."""
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return run(compiled.asm["ptx"], grid, args, shared=compiled.metadata.shared, gpu=GPUS[capability])


def _type(value) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return POINTERS[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"
