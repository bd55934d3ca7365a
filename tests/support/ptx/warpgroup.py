"""wgmma, the tensor cores of sm_90: four warps multiply matrices that stay in shared memory, where a descriptor says how they lie.

A descriptor holds the start, two strides and the swizzle. Rows (of A, columns of B) come in groups of 8 with `stride` between the groups
where the depth is contiguous; else `span` bytes of them are contiguous, `leading` between the spans and `stride` between 8 steps of depth.
"""

import numpy as np

from .collectives import COLUMN, ROW, fragments
from .formats import float_to_half, half_to_float, halves, join
from .machine import WARP, Machine, instruction
from .memory import Fault
from .parser import Immediate, Instruction, Unsupported

WARPS = 4
ROWS = 64
# swizzle mode of a descriptor -> bytes over which it permutes, 16 at a time
SPANS = {1: 128, 2: 64, 3: 32}


@instruction("wgmma")
def multiply(machine: Machine, x: Instruction, mask):
    """D = A B + D at once: fences and groups of asynchronous products have nothing to wait for."""
    if "mma_async" not in x.modifiers:
        return
    shape = next(m for m in x.modifiers if m.startswith("m64n"))
    columns, depth = (int(n) for n in shape.removeprefix("m64n").split("k"))
    to, kind, _ = x.types[-3:]
    target, a, b, accumulate, *signs = x.operands
    # one of each for A and B where both are in shared memory, none for tf32
    signs, transposed = signs[:2], [flag.bits for flag in signs[2:]] or [0]
    if kind not in ("f16", "bf16", "tf32") or any(sign.bits != 1 for sign in signs):
        raise Unsupported(x.text)
    machine.counts["mma_flops"] += 2 * 16 * columns * depth * machine.active_warps

    groups = machine.total // (WARPS * WARP)
    if isinstance(a, list):
        left = fragments(machine, a, kind, depth).reshape(groups, ROWS, depth)
    else:
        left = _group_matrix(machine, a, ROWS, depth, kind, transposed[0])
    right = _group_matrix(machine, b, columns, depth, kind, transposed[-1])
    product = (left @ right.swapaxes(1, 2)).reshape(-1, ROWS // WARPS, columns)
    places = [(ROW + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * COLUMN + i % 2) for i in range(columns // 2)]
    keeps = np.array([accumulate.bits != 0]) if isinstance(accumulate, Immediate) else machine.predicate(accumulate)
    before = np.where(machine.by_warp(keeps), _accumulators(machine, target, to), 0)
    results = [(product[:, row, column] + old).astype(np.float32).reshape(-1) for (row, column), old in zip(places, before, strict=True)]
    if to == "f16":
        pairs = zip(results[::2], results[1::2], strict=True)
        results = [join(float_to_half(low, "f16"), float_to_half(high, "f16")) for low, high in pairs]
    for register, values in zip(target, results, strict=True):
        machine.write(register, values, mask)


def _accumulators(machine: Machine, registers: list, kind: str) -> np.ndarray:
    """[values per thread, warps, 32]"""
    bits = [machine.by_warp(machine.bits(register, 4)) for register in registers]
    if kind == "f32":
        return np.stack([b.view(np.float32) for b in bits])
    return np.stack([half_to_float(half, "f16") for b in bits for half in halves(b)])


def _group_matrix(machine: Machine, descriptor, rows: int, depth: int, kind: str, transposed: int) -> np.ndarray:
    """[warp groups, rows, depth] as float32; of groups that do not take part, any numbers."""
    bits, taking = machine.each(descriptor, 8)[:: WARPS * WARP], machine.active[:: WARPS * WARP]
    bits = np.where(taking, bits, bits[taking][0])
    return read_shared_matrix(machine, bits, machine.block_of[:: WARPS * WARP], rows, depth, kind, transposed)


def read_shared_matrix(
    machine: Machine, bits: np.ndarray, blocks: np.ndarray, rows: int, depth: int, kind: str, transposed: int
) -> np.ndarray:
    """[matrices, rows, depth] as float32, for a descriptor and a block of each matrix."""
    span = SPANS.get(int(bits[0] >> np.uint64(62)))
    # the lowest of the three bits of sm_100 is a swizzle that permutes 32 bytes at a time
    if span is None or bits[0] >> np.uint64(61) & np.uint64(1):
        raise Unsupported("a matrix in shared memory without swizzle, or with one of 32 bytes")
    start, leading, stride = ((bits >> np.uint64(shift) & np.uint64(0x3FFF)).astype(np.int64)[:, None, None] * 16 for shift in (0, 16, 32))
    size = 4 if kind == "tf32" else 2
    row, step = np.arange(rows)[:, None], np.arange(depth)
    if transposed:
        along = span // size
        address = start + row // along * leading + step // 8 * stride + step % 8 * span + row % along * size
    else:
        address = start + row // 8 * stride + row % 8 * span + step * size
    # the 16-byte chunks of a span are permuted by the number of the 128-byte line
    address ^= (address >> 7 & span // 16 - 1) << 4
    if address.max() + size > machine.shared_size:
        raise Fault(f"a matrix product reads shared memory up to {address.max() + size} of {machine.shared_size}")
    address += blocks[:, None, None] * machine.shared_stride
    if kind == "tf32":
        return (machine.shared.view(np.uint32)[address // 4] & np.uint32(0xFFFFE000)).view(np.float32)
    return half_to_float(machine.shared.view(np.uint16)[address // 2], kind)
