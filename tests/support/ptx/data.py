"""Loads, stores, asynchronous copies, atomics and control flow."""

import operator

import numpy as np

from .formats import SIZE, TYPES, UNSIGNED, float_to_half, half_to_float, halves, join
from .machine import WARP, Machine, instruction
from .memory import Fault
from .parser import Instruction, Pair, Unsupported


def everyone(mask: np.ndarray | None):
    return slice(None) if mask is None else mask


@instruction("bra")
def branch(machine: Machine, x: Instruction, mask):
    machine.pc[everyone(mask)] = machine.kernel.labels[x.operands[0]]
    if mask is not None:
        taken = machine.by_warp(mask).any(axis=1)
        left = machine.by_warp(machine.active & ~mask).any(axis=1)
        machine.counts["divergent_branches"] += int((taken & left).sum())


@instruction("ret", "exit")
def leave(machine: Machine, x: Instruction, mask):
    machine.pc[everyone(mask)] = len(machine.kernel.instructions)


@instruction("bar", "barrier")
def barrier(machine: Machine, x: Instruction, mask):
    if "red" in x.modifiers:
        raise Unsupported(x.text)
    if "warp" not in x.modifiers:
        machine.waiting[everyone(mask)] = True


@instruction("fence")
def nothing(machine: Machine, x: Instruction, mask):
    pass


@instruction("createpolicy")
def create_policy(machine: Machine, x: Instruction, mask):
    machine.write(x.operands[0], np.zeros(1, np.uint64), mask)


@instruction("trap", "call")
def trap(machine: Machine, x: Instruction, mask):
    raise Fault(f"the kernel stopped itself: {x.text}")


@instruction("ld")
def load(machine: Machine, x: Instruction, mask):
    kind = x.types[-1]
    size = SIZE[kind]
    target, address = x.operands[:2]
    targets = target if isinstance(target, list) else [target]
    if "param" in x.modifiers:
        start = machine.kernel.parameters[address.base].offset + address.offset
        for i, register in enumerate(targets):
            machine.write(register, machine.parameters[start + i * size : start + (i + 1) * size].view(TYPES[kind]), mask)
        return
    memory, offsets, lanes = machine.access(x, address, size * x.vector, mask, "ld")
    elements = memory[: len(memory) // size * size].view(TYPES[kind])
    for i, register in enumerate(targets):
        values = elements[offsets // size + i]
        if mask is not None:
            full = np.zeros(machine.total, values.dtype)
            full[lanes] = values
            values = full
        machine.write(register, values, mask)


@instruction("st")
def store(machine: Machine, x: Instruction, mask):
    size = SIZE[x.types[-1]]
    address, source = x.operands[:2]
    memory, offsets, lanes = machine.access(x, address, size * x.vector, mask, "st")
    elements = memory[: len(memory) // size * size].view(UNSIGNED[size])
    for i, register in enumerate(source if isinstance(source, list) else [source]):
        elements[offsets // size + i] = machine.each(register, size)[lanes]


@instruction("cp")
def copy(machine: Machine, x: Instruction, mask):
    """Copy from global to shared memory at once; what is past the source size is filled with zeros."""
    if "bulk" in x.modifiers:
        raise Unsupported(x.text)
    if not any(m.startswith("shared") for m in x.modifiers):
        # commit_group and wait_group
        return
    target, source, size = x.operands[0], x.operands[1], x.operands[2].bits
    given = machine.each(x.operands[3], 4) if len(x.operands) > 3 else np.full(machine.total, size)
    shared, start, lanes = machine.access_shared(x, target, size, mask, "st")
    window = start[:, None] + np.arange(size)
    shared[window] = 0
    reading = given > 0 if mask is None else mask & (given > 0)
    if not reading.any():
        return
    everywhere = np.zeros(machine.total, np.int64)
    everywhere[lanes] = start
    memory, offsets, lanes = machine.access_global(x, source, size, reading, "ld", cached="cg" not in x.modifiers)
    window = np.arange(size)
    values = np.where(window < given[lanes][:, None], memory[offsets[:, None] + window], 0)
    shared[everywhere[lanes][:, None] + window] = values


@instruction("ldmatrix", "stmatrix")
def move_matrix(machine: Machine, x: Instruction, mask):
    """8 x 8 matrices of 16-bit elements: lanes 8 i .. 8 i + 7 hold the row addresses of matrix i, register i of every lane two elements."""
    taking = np.ones(machine.total, bool) if mask is None else mask
    warps = machine.by_warp(taking).any(axis=1)
    if (machine.by_warp(taking) != warps[:, None]).any():
        raise Unsupported(f"divergent {x.text}")
    loads = x.op == "ldmatrix"
    registers, address = x.operands if loads else reversed(x.operands)
    registers = registers if isinstance(registers, list) else [registers]
    lane = np.arange(WARP)
    givers = taking & (np.tile(lane, machine.total // WARP) < 8 * len(registers))
    shared, offsets, lanes = machine.access_shared(x, address, 16, givers, x.op[:2])
    rows = np.zeros(machine.total, np.int64)
    rows[lanes] = offsets // 2
    rows = rows.reshape(-1, WARP)
    elements = shared.view(np.uint16)
    # a lane holds elements (row lane // 4, columns 2 (lane % 4) and the next), or the transpose
    row, column = lane // 4, 2 * (lane % 4)
    for i, register in enumerate(registers):
        if "trans" in x.modifiers:
            places = [rows[:, 8 * i + column + half] + row for half in (0, 1)]
        else:
            places = [rows[:, 8 * i + row] + column + half for half in (0, 1)]
        if loads:
            machine.write(register, join(*(elements[place] for place in places)).reshape(-1), mask)
        else:
            for place, half in zip(places, halves(machine.by_warp(machine.bits(register, 4))), strict=True):
                elements[place[warps]] = half[warps]


def cas(old, compared, new):
    return new if old == compared else old


ATOMICS = {
    "add": operator.add,
    "max": max,
    "min": min,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "exch": lambda old, new: new,
}


@instruction("atom", "red")
def atomic(machine: Machine, x: Instruction, mask):
    """Read-modify-write, lane by lane in order."""
    kind = x.types[-1]
    size = SIZE[kind]
    target, address, *sources = x.operands if x.op == "atom" else (None, *x.operands)
    name = next((m for m in x.modifiers if m in ATOMICS or m == "cas"), None)
    if name is None:
        raise Unsupported(x.text)
    memory, offsets, lanes = machine.access(x, address, size * x.vector, mask, x.op)
    registers = sources[0] if isinstance(sources[0], list) else [sources[0]]
    targets = target if isinstance(target, list) else [target] * len(registers)
    for i, register in enumerate(registers):
        values = machine.each(register, size)[lanes]
        if kind in ("f16", "bf16", "f16x2", "bf16x2"):
            if target not in (None, "_") or name != "add":
                raise Unsupported(x.text)
            _add_halves(memory.view(np.uint16), offsets // 2 + i * (size // 2), values, kind)
            continue
        elements = memory[: len(memory) // size * size].view(TYPES[kind])
        values = values.view(TYPES[kind])
        extra = machine.each(sources[1], size)[lanes].view(TYPES[kind]) if name == "cas" else None
        old = np.empty(len(values), TYPES[kind])
        for j, at in enumerate((offsets // size + i).tolist()):
            old[j] = elements[at]
            elements[at] = cas(old[j], values[j], extra[j]) if name == "cas" else ATOMICS[name](old[j], values[j])
        if targets[i] not in (None, "_"):
            full = np.zeros(machine.total, TYPES[kind])
            full[lanes] = old
            machine.write(targets[i], full, mask)


def _add_halves(elements: np.ndarray, at: np.ndarray, bits: np.ndarray, kind: str) -> None:
    parts = halves(bits) if kind.endswith("x2") else (bits,)
    for i, part in enumerate(parts):
        for j, value in zip((at + i).tolist(), part, strict=True):
            total = half_to_float(elements[j : j + 1], kind) + half_to_float(np.array([value]), kind)
            elements[j] = float_to_half(total, kind)[0]


@instruction("cvta")
def convert_address(machine: Machine, x: Instruction, mask):
    if "global" not in x.modifiers:
        raise Unsupported(x.text)
    machine.write(x.operands[0], machine.bits(x.operands[1], SIZE[x.modifiers[-1]]), mask)


@instruction("shfl")
def shuffle(machine: Machine, x: Instruction, mask):
    mode = next(m for m in x.modifiers if m in ("bfly", "down", "up", "idx"))
    target, *sources = x.operands
    values, other, clamp = (machine.by_warp(machine.bits(source, 4)) for source in sources[:3])
    other, clamp = other.astype(np.int64) & 31, clamp.astype(np.int64)
    lane = np.arange(WARP)[None]
    segment, limit = clamp >> 8 & 31, clamp & 31
    highest, lowest = lane & segment | limit & ~segment, lane & segment
    origin = {"bfly": lane ^ other, "down": lane + other, "up": lane - other, "idx": lowest | other & ~segment}[mode]
    inside = origin >= highest if mode == "up" else origin <= highest
    moved = np.take_along_axis(values, np.where(inside, origin, lane), axis=1)
    first, second = target if isinstance(target, Pair) else (target, "_")
    machine.write(first, moved.reshape(-1), mask)
    machine.write(second, inside.reshape(-1), mask)
