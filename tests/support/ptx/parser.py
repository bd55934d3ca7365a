"""PTX text -> Kernel: instructions with parsed operands, parameters, shared symbols, basic blocks."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .formats import SIZE, TYPES


class Unsupported(Exception):
    """An instruction or a form that the emulator does not know."""


class Immediate(NamedTuple):
    kind: str  # "int", "f32" or "f64": how the bits were written
    bits: int


class Address(NamedTuple):
    base: str | None
    offset: int


class Pair(NamedTuple):
    """Two destinations, `a|b`."""

    first: str
    second: str


@dataclass(slots=True)
class Instruction:
    text: str
    op: str
    modifiers: list[str]
    operands: list
    types: list[str]
    guard: str | None = None
    negated: bool = False
    category: str = ""

    @property
    def vector(self) -> int:
        """Elements of a vector access."""
        return next((int(m[1]) for m in self.modifiers if m in ("v2", "v4", "v8")), 1)


class Parameter(NamedTuple):
    offset: int
    type: str
    size: int


@dataclass
class Kernel:
    """One `.entry` of a PTX module."""

    name: str
    block: tuple[int, ...] | None
    parameters: dict[str, Parameter]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    register_ranges: dict[str, str] = field(default_factory=dict)
    shared_symbols: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    block_ends: list[int] = field(default_factory=list)  # for each instruction, where its basic block ends

    def register_type(self, name: str) -> str:
        if name not in self.registers:
            kind = self.register_ranges.get(name.rstrip("0123456789"))
            if kind is None:
                raise Unsupported(f"undeclared symbol {name}")
            self.registers[name] = kind
        return self.registers[name]


def classify(op: str, modifiers: list[str], types: list[str]) -> str:
    """Name the pipe or purpose of an instruction."""
    last = types[-1] if types else ""
    if op == "cp":
        return "cp.async" if any("shared" in m for m in modifiers) else "control"
    if op in ("ld", "st", "atom", "red", "ldmatrix", "stmatrix"):
        space = next((s for s in ("global", "param", "shared") if any(m.startswith(s) for m in modifiers)), "generic")
        return f"{op}.{space}"
    if op in ("bra", "ret", "exit", "trap", "call"):
        return "branch"
    if op in ("bar", "barrier"):
        return "warpsync" if "warp" in modifiers else "sync"
    if op in ("fence", "createpolicy", "mbarrier", "elect"):
        return "control"
    if op in ("shfl", "vote", "redux"):
        return "shuffle/vote"
    if op in ("mma", "wgmma", "tcgen05"):
        return "tensor" if op == "mma" or {"mma_async", "mma"} & set(modifiers) else "control"
    if op in ("ex2", "lg2", "rsqrt") or (op in ("rcp", "sqrt", "div") and last[:1] == "f"):
        return "mufu"
    if op == "cvt":
        return "convert"
    if op in ("mov", "cvta"):
        return "mov"
    if op in ("setp", "selp"):
        return "select/compare"
    if last in ("f32", "f32x2", "f16", "f16x2", "bf16", "bf16x2"):
        return "fp"
    return "fp64" if last == "f64" else "int"


def parse_number(text: str) -> Immediate | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate("f32", int(text[2:], 16))
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Immediate("f64", int(text[2:], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate("int", int(text.rstrip("U"), 0 if "x" in text.lower() else 10))
    if re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", text):
        return Immediate("f64", int(np.float64(text).view(np.uint64)))
    return None


def parse_operand(text: str):
    if text[0] == "{":
        return [parse_operand(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    if text[0] == "[":
        match = re.fullmatch(r"([%\w$@]+)\s*(?:\+\s*(-?\w+)|(-\d+))?", text[1:-1].strip())
        if not match:
            raise Unsupported(f"address {text}")
        offset = int(match.group(2) or match.group(3) or "0", 0)
        number = parse_number(match.group(1))
        return Address(None, number.bits + offset) if number else Address(match.group(1), offset)
    if "|" in text:
        return Pair(*(part.strip() for part in text.split("|")))
    return parse_number(text) or text


def parse_instruction(text: str) -> Instruction:
    rest, guard, negated = text, None, False
    match = re.match(r"@(!?)\s*([%\w$@]+)\s+(.*)", text)
    if match:
        negated, guard, rest = match.group(1) == "!", match.group(2), match.group(3)
    name, _, rest = rest.partition(" ")
    op, *modifiers = name.replace("::", "__").split(".")
    operands = [parse_operand(o.strip()) for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", rest) if o.strip()]
    types = [m for m in modifiers if m in TYPES]
    return Instruction(text, op, modifiers, operands, types, guard, negated, classify(op, modifiers, types))


def parse(ptx: str) -> Kernel:
    """Parse the first `.entry` of a module."""
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.S)
    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", ptx, flags=re.M)
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", ptx, re.S)
    if not entry:
        raise Unsupported("no .entry in the module")
    depth, end = 1, entry.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(ptx[end], 0)
        end += 1
    block = re.search(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)", entry.group(3))
    threads = tuple(int(n) for n in block.group(1).split(",") if n.strip()) if block else None
    kernel = Kernel(entry.group(1), threads, _parameters(entry.group(2)))
    for symbol in re.finditer(r"^[^\n;]*\.shared\s+[^\n;]*;", ptx[: entry.start()], re.M):
        _shared(kernel, symbol.group())
    _body(kernel, ptx[entry.end() : end - 1])
    _basic_blocks(kernel)
    return kernel


def _parameters(text: str) -> dict[str, Parameter]:
    parameters, offset = {}, 0
    for declaration in (d.strip() for d in text.split(",") if d.strip()):
        kind = re.search(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", declaration).group(1)
        name = re.search(r"([\w$]+)$", declaration).group(1)
        offset = -(-offset // SIZE[kind]) * SIZE[kind]
        parameters[name] = Parameter(offset, kind, SIZE[kind])
        offset += SIZE[kind]
    return parameters


def _shared(kernel: Kernel, declaration: str) -> None:
    """Place a static shared array; one of size 0 is the dynamic part, which follows the static ones."""
    match = re.search(r"\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d*)\]", declaration)
    if not match:
        raise Unsupported(declaration)
    align, size = int(match.group(1)), SIZE[match.group(2)] * int(match.group(4) or 0)
    start = -(-kernel.static_shared // align) * align
    kernel.shared_symbols[match.group(3)] = start
    kernel.static_shared = start + size


def _body(kernel: Kernel, body: str) -> None:
    token = re.compile(r"\s*(?:([\w$]+)\s*:(?!:)|(\{)|(\})|((?:[^;{}\"]|\"[^\"]*\"|\{[^{}]*\})+);)", re.S)
    scopes: list[dict[str, str]] = [{}]
    position = 0
    while match := token.match(body, position):
        position = match.end()
        label, opened, closed, statement = match.groups()
        if label:
            kernel.labels[label] = len(kernel.instructions)
        elif opened:
            scopes.append({})
        elif closed:
            scopes.pop()
        else:
            _statement(kernel, " ".join(statement.split()), scopes)
    if body[position:].strip():
        raise Unsupported(f"cannot parse near {body[position : position + 80]!r}")


def _statement(kernel: Kernel, text: str, scopes: list[dict[str, str]]) -> None:
    if text.startswith(".reg"):
        _, kind, names = text.split(None, 2)
        for name in (n.strip() for n in names.split(",")):
            span = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            if span:
                kernel.register_ranges[span.group(1)] = kind[1:]
                continue
            if len(scopes) > 1:
                # inline assembly declares registers in a scope of its own: make their names unique
                scopes[-1][name] = name = f"{name}@{len(kernel.registers)}"
            kernel.registers[name] = kind[1:]
    elif text.startswith(".shared"):
        _shared(kernel, text)
    elif text[0] != ".":
        for scope in reversed(scopes):
            for name, unique in scope.items():
                text = re.sub(rf"(?<![\w%$@]){re.escape(name)}(?![\w$@])", unique, text)
        kernel.instructions.append(parse_instruction(text))


def _basic_blocks(kernel: Kernel) -> None:
    count = len(kernel.instructions)
    leaders = {count, *kernel.labels.values()}
    leaders.update(i + 1 for i, x in enumerate(kernel.instructions) if x.op in ("bra", "ret", "exit", "bar", "barrier", "trap"))
    kernel.block_ends = [0] * count
    end = count
    for i in reversed(range(count)):
        kernel.block_ends[i] = end
        if i in leaders:
            end = i
