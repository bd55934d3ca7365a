"""Moves, conversions, arithmetic and comparisons."""

from functools import reduce

import numpy as np

from .bitwise import LOGIC
from .formats import SIZE, TYPES, float_to_bf16, float_to_half, float_to_tf32, half_to_float, halves, is_float, join
from .machine import Machine, instruction
from .parser import Instruction, Pair

ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
SMALLEST_NORMAL = np.float32(1.17549435e-38)


@instruction("mov")
def move(machine: Machine, x: Instruction, mask):
    kind = x.modifiers[-1]
    source = x.operands[1]
    machine.write(x.operands[0], machine.predicate(source) if kind == "pred" else machine.bits(source, SIZE[kind]), mask)


@instruction("cvt")
def convert(machine: Machine, x: Instruction, mask):
    to, *sources = x.types
    toward_zero = "rz" in x.modifiers
    if to in ("f16x2", "bf16x2"):
        # d = {high: a, low: b}
        high, low = (machine.values(operand, "f32") for operand in x.operands[1:3])
        if "relu" in x.modifiers:
            high, low = np.maximum(high, 0), np.maximum(low, 0)
        packed = join(float_to_half(low, to, toward_zero=toward_zero), float_to_half(high, to, toward_zero=toward_zero))
        machine.write(x.operands[0], packed, mask)
        return
    values = machine.values(x.operands[1], sources[0])
    rounding = next((m for m in x.modifiers if m in ROUNDINGS), None)
    if is_float(to):
        machine.write(x.operands[0], _to_float(x, values, to, rounding, toward_zero), mask)
    elif is_float(sources[0]):
        machine.write(x.operands[0], _float_to_integer(values, to, rounding or "rzi"), mask)
    else:
        if "sat" in x.modifiers:
            span = np.iinfo(TYPES[to])
            values = np.clip(values, span.min if values.dtype.kind == "i" else 0, min(span.max, np.iinfo(values.dtype).max))
        machine.write(x.operands[0], values.astype(TYPES[to]), mask)


def _float_to_integer(values: np.ndarray, to: str, rounding: str) -> np.ndarray:
    """Saturating; NaN becomes 0."""
    span = np.iinfo(TYPES[to])
    rounded = np.clip(np.nan_to_num(ROUNDINGS[rounding](values.astype(np.float64)), nan=0), float(span.min), float(span.max))
    # float64 cannot hold the largest 64-bit integers
    highest = rounded >= float(span.max)
    return np.where(highest, span.max, np.where(highest, 0, rounded).astype(TYPES[to])).astype(TYPES[to])


def _to_float(x: Instruction, values: np.ndarray, to: str, rounding: str | None, toward_zero: bool) -> np.ndarray:
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    if rounding:
        values = ROUNDINGS[rounding](values)
    if "sat" in x.modifiers:
        values = np.clip(np.nan_to_num(values, nan=0), 0, 1)
    if "relu" in x.modifiers:
        values = np.maximum(values, 0)
    if to == "bf16":
        return float_to_bf16(values.astype(np.float32), toward_zero=toward_zero)
    if to == "tf32":
        return float_to_tf32(values)
    result = values.astype(TYPES[to])
    if toward_zero and to != "f64":
        away = np.abs(result.astype(np.float64)) > np.abs(values.astype(np.float64))
        result = np.where(away, np.nextafter(result, result.dtype.type(0)), result)
    return result


def _on_floats(machine: Machine, x: Instruction, mask, function) -> None:
    """Apply a function of float32 (float64) arrays to sources of any floating-point type, packed ones too."""
    kind, (target, *sources) = x.types[-1], x.operands
    if kind in ("f16x2", "bf16x2"):
        lows, highs = zip(*(halves(machine.bits(source, 4)) for source in sources), strict=True)
        low, high = (float_to_half(function(*(half_to_float(p, kind) for p in parts)), kind) for parts in (lows, highs))
        machine.write(target, join(low, high), mask)
        return
    if kind == "f32x2":
        pairs = [np.ascontiguousarray(machine.bits(source, 8)).view(np.float32).reshape(-1, 2) for source in sources]
        pair = function(*np.broadcast_arrays(*pairs)).astype(np.float32)
        machine.write(target, np.ascontiguousarray(pair).view(np.uint64).reshape(-1), mask)
        return
    kinds = [kind] * len(sources)
    if len(x.types) > 1:
        # sm_100 adds narrow numbers, or their products, to a float32 number
        kind, kinds = x.types[0], [*kinds[:-1], x.types[0]]
    values = [machine.values(source, narrow) for source, narrow in zip(sources, kinds, strict=True)]
    values = [v.astype(np.float32) if v.dtype == np.float16 else v for v in values]
    if "ftz" in x.modifiers and kind == "f32":
        values = [np.where(np.abs(v) < SMALLEST_NORMAL, np.copysign(np.float32(0), v), v) for v in values]
    result = function(*values)
    if "sat" in x.modifiers:
        result = np.clip(np.nan_to_num(result, nan=0), 0, 1)
    machine.write(target, float_to_bf16(result) if kind == "bf16" else result.astype(TYPES[kind]), mask)


def _on_numbers(machine: Machine, x: Instruction, mask, function) -> None:
    kind, (target, *sources) = x.types[-1], x.operands
    if is_float(kind):
        _on_floats(machine, x, mask, function)
    elif kind in ("s16x2", "u16x2"):
        parts = zip(*(halves(machine.bits(source, 4)) for source in sources), strict=True)
        low, high = (function(*(p.view(TYPES[kind[:3]]) for p in part)).view(np.uint16) for part in parts)
        machine.write(target, join(low, high), mask)
    else:
        machine.write(target, function(*(machine.values(source, kind) for source in sources)), mask)


EVERY_NUMBER = {"add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs}
FLOATS = {
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a.astype(np.float64)),
}


@instruction(*EVERY_NUMBER)
def number(machine: Machine, x: Instruction, mask):
    _on_numbers(machine, x, mask, EVERY_NUMBER[x.op])


@instruction(*FLOATS)
def floating(machine: Machine, x: Instruction, mask):
    _on_floats(machine, x, mask, FLOATS[x.op])


@instruction("max", "min")
def extreme(machine: Machine, x: Instruction, mask):
    propagates_nan = not is_float(x.types[-1]) or "NaN" in x.modifiers
    function = getattr(np, x.op + "imum" if propagates_nan else "f" + x.op)
    # sm_100 takes three numbers at once
    _on_numbers(machine, x, mask, lambda *values: reduce(function, values))


@instruction("mul")
def multiply(machine: Machine, x: Instruction, mask):
    if is_float(x.types[-1]):
        _on_floats(machine, x, mask, np.multiply)
    else:
        machine.write(x.operands[0], _product(machine, x), mask)


@instruction("mad")
def multiply_add(machine: Machine, x: Instruction, mask):
    if is_float(x.types[-1]):
        _on_floats(machine, x, mask, FLOATS["fma"])
    else:
        product = _product(machine, x)
        machine.write(x.operands[0], product + machine.bits(x.operands[3], product.dtype.itemsize).view(product.dtype), mask)


def _product(machine: Machine, x: Instruction) -> np.ndarray:
    """The low half, the high half or the whole of an integer product."""
    kind = x.types[-1]
    a, b = machine.values(x.operands[1], kind), machine.values(x.operands[2], kind)
    if "wide" not in x.modifiers and "hi" not in x.modifiers:
        return a * b
    if SIZE[kind] == 8:
        pairs = zip(*np.broadcast_arrays(a, b), strict=True)
        return np.array([int(p) * int(q) >> 64 & (1 << 64) - 1 for p, q in pairs], np.uint64).view(TYPES[kind])
    whole = np.dtype(f"{a.dtype.kind}{2 * SIZE[kind]}").type
    product = a.astype(whole) * b.astype(whole)
    return product if "wide" in x.modifiers else (product >> whole(8 * SIZE[kind])).astype(TYPES[kind])


@instruction("div", "rem")
def divide(machine: Machine, x: Instruction, mask):
    if is_float(x.types[-1]):
        _on_floats(machine, x, mask, np.divide)
        return

    def truncated(a, b):
        b = np.where(b == 0, b.dtype.type(1), b)
        rest = np.fmod(a, b)
        return rest if x.op == "rem" else (a - rest) // b

    _on_numbers(machine, x, mask, truncated)


COMPARISONS = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


def _compare(name: str, a: np.ndarray, b: np.ndarray, unordered: np.ndarray) -> np.ndarray:
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    if name in COMPARISONS:
        return COMPARISONS[name](a, b) & ~unordered
    # equ, ltu, ...: true as well where either is NaN
    return COMPARISONS[name[:-1]](a, b) | unordered


@instruction("setp")
def compare(machine: Machine, x: Instruction, mask):
    kind, name = x.modifiers[-1], x.modifiers[0]
    first, second = x.operands[0] if isinstance(x.operands[0], Pair) else (x.operands[0], "_")
    if kind in ("f16x2", "bf16x2"):
        # the second destination takes the result of the high halves
        a, b = ([half_to_float(part, kind) for part in halves(machine.bits(operand, 4))] for operand in x.operands[1:3])
        result, complement = (_compare(name, p, q, np.isnan(p) | np.isnan(q)) for p, q in zip(a, b, strict=True))
    else:
        a, b = machine.values(x.operands[1], kind), machine.values(x.operands[2], kind)
        result = _compare(name, a, b, np.isnan(a) | np.isnan(b) if is_float(kind) else np.zeros(1, bool))
        complement = ~result
    combination = next((m for m in x.modifiers[1:] if m in LOGIC), None)
    if combination:
        other = machine.predicate(x.operands[3])
        result, complement = LOGIC[combination](result, other), LOGIC[combination](complement, other)
    machine.write(first, result, mask)
    machine.write(second, complement, mask)


@instruction("selp")
def select(machine: Machine, x: Instruction, mask):
    size = SIZE[x.modifiers[-1]]
    _, a, b, condition = x.operands
    machine.write(x.operands[0], np.where(machine.predicate(condition), machine.bits(a, size), machine.bits(b, size)), mask)
