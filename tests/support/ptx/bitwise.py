"""Logic, shifts, bit fields and byte permutations."""

import numpy as np

from .formats import SIZE, TYPES, UNSIGNED
from .machine import Machine, instruction
from .parser import Instruction, Unsupported


@instruction("shl", "shr")
def shift(machine: Machine, x: Instruction, mask):
    """A shift by the width or more leaves zeros, or the sign."""
    kind = x.types[-1]
    width = 8 * SIZE[kind]
    values, by = machine.values(x.operands[1], kind), machine.bits(x.operands[2], 4)
    limited = np.minimum(by, np.uint32(width - 1)).astype(values.dtype)
    shifted = values << limited if x.op == "shl" else values >> limited
    if x.op == "shl" or kind[0] != "s":
        shifted = np.where(by >= width, values.dtype.type(0), shifted)
    machine.write(x.operands[0], shifted, mask)


LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@instruction(*LOGIC)
def logic(machine: Machine, x: Instruction, mask):
    target, *sources = x.operands
    kind = x.modifiers[-1]
    values = (machine.predicate(s) if kind == "pred" else machine.bits(s, SIZE[kind]) for s in sources)
    machine.write(target, LOGIC[x.op](*values), mask)


@instruction("lop3")
def lookup(machine: Machine, x: Instruction, mask):
    """Any function of three bits, by its truth table."""
    a, b, c = (machine.bits(operand, 4) for operand in x.operands[1:4])
    result = np.zeros(1, np.uint32)
    for i in range(8):
        if x.operands[4].bits >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    machine.write(x.operands[0], result, mask)


@instruction("prmt")
def permute(machine: Machine, x: Instruction, mask):
    """Four bytes of eight, chosen by the digits of the third operand; digit 8 and up repeats the sign of the byte."""
    if len(x.modifiers) > 1:
        raise Unsupported(x.text)
    a, b, selector = (machine.each(operand, 4) for operand in x.operands[1:4])
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(machine.total, np.uint32)
    for i in range(4):
        digit = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (source >> (digit & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)).astype(np.uint32)
        byte = np.where(digit & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    machine.write(x.operands[0], result, mask)


@instruction("shf")
def funnel_shift(machine: Machine, x: Instruction, mask):
    low, high, by = (machine.bits(operand, 4).astype(np.uint64) for operand in x.operands[1:4])
    by = by & np.uint64(31) if "wrap" in x.modifiers else np.minimum(by, np.uint64(32))
    both = low | high << np.uint64(32)
    result = both << by >> np.uint64(32) if "l" in x.modifiers else both >> by
    if "l" in x.modifiers:
        result = np.where(by == 32, low, result)
    machine.write(x.operands[0], result.astype(np.uint32), mask)


@instruction("bfe")
def extract_bits(machine: Machine, x: Instruction, mask):
    kind = x.types[-1]
    wide = np.int64 if kind[0] == "s" else np.uint64
    values = machine.values(x.operands[1], kind).astype(wide)
    # a shift by 64 leaves 0
    start, length = _span(machine, x.operands[2:4], 8 * SIZE[kind], wide)
    ones = (wide(1) << length) - wide(1)
    field = values >> start & ones
    if kind[0] == "s":
        last = np.minimum(start + length - 1, 8 * SIZE[kind] - 1)
        field = np.where((length > 0) & (values >> last & 1 == 1), field | ~ones, field)
    machine.write(x.operands[0], field.astype(TYPES[kind]), mask)


@instruction("bfi")
def insert_bits(machine: Machine, x: Instruction, mask):
    size = SIZE[x.modifiers[-1]]
    field, base = (machine.bits(operand, size).astype(np.uint64) for operand in x.operands[1:3])
    start, length = _span(machine, x.operands[3:5], 8 * size, np.uint64)
    ones = (np.uint64(1) << length) - np.uint64(1) << start
    machine.write(x.operands[0], (field << start & ones | base & ~ones).astype(UNSIGNED[size]), mask)


def _span(machine: Machine, operands: list, width: int, dtype) -> list[np.ndarray]:
    """Start and length of a bit field."""
    return [np.minimum(machine.bits(operand, 4) & np.uint32(255), np.uint32(width)).astype(dtype) for operand in operands]


@instruction("popc", "clz", "brev")
def bit_pattern(machine: Machine, x: Instruction, mask):
    size = SIZE[x.modifiers[-1]]
    values = np.ascontiguousarray(machine.bits(x.operands[1], size))
    digits = np.unpackbits(values.astype(f">u{size}").view(np.uint8).reshape(-1, size), axis=1)
    if x.op == "popc":
        result = digits.sum(axis=1).astype(np.uint32)
    elif x.op == "clz":
        result = np.where(digits.any(axis=1), digits.argmax(axis=1), 8 * size).astype(np.uint32)
    else:
        result = np.packbits(digits[:, ::-1], axis=1).view(f">u{size}").reshape(-1).astype(UNSIGNED[size])
    machine.write(x.operands[0], result, mask)
