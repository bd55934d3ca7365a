"""`run`: one kernel launch on arrays of this machine."""

import math

import numpy as np
import torch

from . import arithmetic, bitwise, collectives, data, tensor_memory, warpgroup  # noqa: F401  (they register their instructions)
from .bounds import A100, GPU, report
from .formats import SIZE, TYPES
from .machine import Machine
from .memory import GLOBAL_BASE, GlobalMemory, Traffic
from .parser import parse

# threads that share one NumPy array per register
BATCH = 1 << 16


def run(ptx: str, grid, args: list, *, block=None, shared: int = 0, blocks=None, gpu: GPU = A100, resident: int = 32) -> dict:
    """Execute a kernel in place on NumPy arrays or CPU tensors of any strides, and count what a GPU would do.

    Args:
        ptx: module text; its first entry is run.
        grid: blocks along x, y, z (fewer axes allowed).
        args: arrays, tensors and numbers in parameter order; parameters without an argument are 0 (Triton's scratch pointers).
        block: threads along x, y, z; by default what the kernel requires.
        shared: bytes of dynamic shared memory (`metadata.shared` of Triton).
        blocks: linear indices of the blocks to run, by default all; the bounds are scaled to the whole grid.
        gpu: what to count for.
        resident: blocks that the registers of a multiprocessor hold, which PTX does not tell.

    Returns:
        warp_insts, warp_insts_by_class: warp instructions executed, of PTX.
        global_{ld,st}_{requests,sectors,sectors_ideal,bytes_useful}, sectors_per_{ld,st}_request: coalescing.
        shared_{ld,st}_{requests,wavefronts}, shared_bank_conflicts, divergent_branches, mma_flops.
        l2_sectors_{read,write,atomic}, l1_hit_rate, dram_{read,write}_bytes, dram_bytes: through cold LRU caches.
        dram_bytes_compulsory: every touched 32-byte sector once. per_buffer: which argument moves how much.
        bound, limiter: least microseconds per resource (bounds.py), and the largest.

    Raises:
        Fault: an access out of bounds or misaligned. Unsupported: an instruction that the emulator does not know.
    """
    kernel = parse(ptx)
    grid, block = _three(grid), _three(block or kernel.block)
    memory = GlobalMemory()
    parameters = np.zeros(max((p.offset + p.size for p in kernel.parameters.values()), default=0), np.uint8)
    placed = []
    for (name, parameter), arg in zip(kernel.parameters.items(), args, strict=False):
        if isinstance(arg, np.ndarray | torch.Tensor):
            array = _array(arg)
            offset = memory.place(name, _extent(array))
            placed.append((offset, array))
            value = np.array([GLOBAL_BASE + offset], np.uint64)
        elif isinstance(arg, float):
            value = np.array([arg], f"f{SIZE[parameter.type]}")
        else:
            value = np.array([arg], TYPES[parameter.type])
        parameters[parameter.offset : parameter.offset + parameter.size] = value.view(np.uint8)
    memory.allocate()
    for offset, array in placed:
        _view(memory.bytes, offset, array)[...] = array
    threads = -(-math.prod(block) // 32) * 32
    shared += -(-kernel.static_shared // 16) * 16
    traffic = Traffic(memory, gpu.l1(threads, shared, resident), gpu.l2_size, gpu.multiprocessors)
    machine = Machine(kernel, grid, block, shared, parameters, memory, traffic)
    todo = list(range(math.prod(grid)) if blocks is None else blocks)
    together = max(1, min(gpu.multiprocessors * gpu.resident(threads, shared, resident), BATCH // threads))
    with np.errstate(all="ignore"):
        for start in range(0, len(todo), together):
            machine.run(todo[start : start + together])
    for offset, array in placed:
        array[...] = _view(memory.bytes, offset, array)
    return report(machine, gpu, len(todo), math.prod(grid))


def _three(size) -> tuple[int, int, int]:
    return (*((size,) if isinstance(size, int) else size), 1, 1)[:3]


def _array(arg) -> np.ndarray:
    """The argument as an array that shares its memory; bfloat16 and bool as unsigned integers."""
    if isinstance(arg, np.ndarray):
        return arg
    raw = {torch.bfloat16: torch.uint16, torch.bool: torch.uint8}.get(arg.dtype)
    return (arg.detach().view(raw) if raw else arg.detach()).numpy()


def _extent(array: np.ndarray) -> int:
    """Bytes from the first element to the end of the last."""
    if array.size == 0:
        return 0
    return sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) + array.itemsize


def _view(memory: np.ndarray, offset: int, array: np.ndarray) -> np.ndarray:
    """The elements of `array`, with its strides, at an offset of the arena."""
    start = memory[offset : offset + _extent(array)].view()
    return np.ndarray(array.shape, array.dtype, start.data, 0, array.strides)
