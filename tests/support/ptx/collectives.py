"""What the lanes of a warp do together: votes, reductions, tensor cores."""

import numpy as np

from .formats import TYPES, float_to_half, half_to_float, halves, join
from .machine import WARP, Machine, instruction
from .parser import Instruction, Unsupported


@instruction("vote")
def vote(machine: Machine, x: Instruction, mask):
    present = machine.by_warp(machine.active if mask is None else mask)
    yes = machine.by_warp(machine.predicate(x.operands[1])) & present
    if "ballot" in x.modifiers:
        bits = (yes.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(axis=1).astype(np.uint32)
        machine.write(x.operands[0], np.repeat(bits, WARP), mask)
        return
    everyone = (yes | ~present).all(axis=1)
    result = yes.any(axis=1) if "any" in x.modifiers else everyone | ~yes.any(axis=1) if "uni" in x.modifiers else everyone
    machine.write(x.operands[0], np.repeat(result, WARP), mask)


@instruction("redux")
def reduce(machine: Machine, x: Instruction, mask):
    kind = x.types[-1]
    values = machine.by_warp(machine.values(x.operands[1], kind))
    present = machine.by_warp(machine.active if mask is None else mask)
    name = next(m for m in x.modifiers if m in ("add", "min", "max", "and", "or", "xor"))
    if kind == "f32":
        function, neutral = {"min": (np.minimum, np.inf), "max": (np.maximum, -np.inf)}[name]
        if "NaN" not in x.modifiers:
            function = np.fmin if name == "min" else np.fmax
        values = np.abs(values) if "abs" in x.modifiers else values
        result = function.reduce(np.where(present, values, np.float32(neutral)), axis=1)
        machine.write(x.operands[0], np.repeat(result, WARP), mask)
        return
    span = np.iinfo(TYPES[kind])
    all_ones = -1 if kind[0] == "s" else span.max
    function, neutral = {
        "add": (np.add, 0),
        "min": (np.minimum, span.max),
        "max": (np.maximum, span.min),
        "and": (np.bitwise_and, all_ones),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
    }[name]
    result = function.reduce(np.where(present, values, values.dtype.type(neutral)), axis=1, dtype=values.dtype)
    machine.write(x.operands[0], np.repeat(result, WARP), mask)


LANE = np.arange(WARP)
ROW, COLUMN = LANE // 4, LANE % 4


@instruction("mma")
def multiply_matrices(machine: Machine, x: Instruction, mask):
    """D = A B + C on fragments of 16 x K, K x 8 and 16 x 8, in float32: f16, bf16 (K 8, 16), tf32 (K 4, 8), accumulated in f32 or f16."""
    shape = next(m for m in x.modifiers if m.startswith("m16n8k"))
    depth = int(shape.removeprefix("m16n8k"))
    to, kind, _, accumulator = x.types[-4:]
    if kind not in ("f16", "bf16", "tf32"):
        raise Unsupported(x.text)
    machine.counts["mma_flops"] += 2 * 16 * 8 * depth * machine.active_warps
    warps = machine.total // WARP
    a = fragments(machine, x.operands[1], kind, depth)
    b, c = (np.zeros((warps, *size), np.float32) for size in ((depth, 8), (16, 8)))
    for i, register in enumerate(x.operands[2]):
        for row, values in _elements(machine, register, kind, i):
            b[:, row, ROW] = values
    for i, values in enumerate(_accumulators(machine, x.operands[3], accumulator)):
        c[:, ROW + 8 * (i // 2), 2 * COLUMN + i % 2] = values
    d = a @ b + c
    results = [np.ascontiguousarray(d[:, ROW + 8 * (i // 2), 2 * COLUMN + i % 2]).reshape(-1) for i in range(4)]
    if to == "f16":
        low, high = results[::2], results[1::2]
        results = [join(float_to_half(p, "f16"), float_to_half(q, "f16")) for p, q in zip(low, high, strict=True)]
    for register, values in zip(x.operands[0], results, strict=True):
        machine.write(register, values, mask)


def fragments(machine: Machine, registers: list, kind: str, depth: int) -> np.ndarray:
    """[warps, 16, depth]: the rows of A that each warp holds in registers."""
    a = np.zeros((machine.total // WARP, 16, depth), np.float32)
    for i, register in enumerate(registers):
        for column, values in _elements(machine, register, kind, i // 2):
            a[:, ROW + 8 * (i % 2), column] = values
    return a


def _elements(machine: Machine, register, kind: str, part: int):
    """Yield (index along K of each lane, values [warps, 32]) for what one register of A or B holds."""
    bits = machine.by_warp(machine.bits(register, 4))
    if kind == "tf32":
        yield COLUMN + 4 * part, (bits & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        for i, half in enumerate(halves(bits)):
            yield 2 * COLUMN + i + 8 * part, half_to_float(half, kind)


def _accumulators(machine: Machine, registers: list, kind: str):
    for register in registers:
        bits = machine.by_warp(machine.bits(register, 4))
        if kind == "f32":
            yield bits.view(np.float32)
        else:
            yield from (half_to_float(half, "f16") for half in halves(bits))
