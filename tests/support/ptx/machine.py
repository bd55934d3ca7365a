"""Warps in lock step: every register is a NumPy array over the threads of a batch of blocks.

Each thread has a program counter. The lowest one with threads that can run goes next, for one basic block, so that divergent threads meet
again where the compiler joins them. Threads that wait at a barrier are released when the others of their block wait too or have left.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .formats import SIZE, TYPES, UNSIGNED, bf16_to_float
from .memory import GLOBAL_BASE, Fault, GlobalMemory, Traffic
from .parser import Address, Immediate, Instruction, Kernel, Unsupported

WARP = 32
STEP_LIMIT = 2_000_000

# op -> function(machine, instruction, mask); mask None means that every thread takes part
INSTRUCTIONS: dict[str, Callable] = {}


def instruction(*ops: str):
    """Register the semantics of instructions."""

    def register(function):
        INSTRUCTIONS.update(dict.fromkeys(ops, function))
        return function

    return register


class Access(NamedTuple):
    """One memory instruction: the bytes of a space, and of each active thread its index into them."""

    memory: np.ndarray
    offsets: np.ndarray
    lanes: np.ndarray


class Machine:
    """Executes batches of blocks of one launch and counts what they execute."""

    def __init__(self, kernel: Kernel, grid, block, shared: int, parameters: np.ndarray, memory: GlobalMemory, traffic: Traffic):
        self.kernel, self.grid, self.block, self.shared_size = kernel, grid, block, shared
        self.parameters, self.memory, self.traffic, self.counts = parameters, memory, traffic, traffic.counts
        self.threads = block[0] * block[1] * block[2]
        self.warps = -(-self.threads // WARP)
        self.executed = np.zeros(len(kernel.instructions), np.int64)  # warps that executed each instruction
        for x in kernel.instructions:
            if x.op not in INSTRUCTIONS:
                raise Unsupported(f"instruction not implemented: {x.text}")

    def run(self, blocks: list[int]) -> None:
        """Run blocks of the grid, given by linear index, at the same time."""
        self._start(np.asarray(blocks, np.int64))
        for _ in range(STEP_LIMIT):
            running = ~(self.waiting | self.exited)
            if not running.any():
                if not self.waiting.any():
                    return
                self.waiting[:] = False
                continue
            if self.waiting.any():
                alive = running.reshape(len(blocks), -1).any(axis=1)
                released = self.waiting & ~alive[self.block_of]
                if released.any():
                    self.waiting[released] = False
                    continue
            self._step(running)
        raise Fault(f"no end after {STEP_LIMIT} basic blocks")

    def _start(self, blocks: np.ndarray) -> None:
        padded = self.warps * WARP
        self.total = len(blocks) * padded
        self.registers: dict[str, np.ndarray] = {}
        thread = np.tile(np.arange(padded), len(blocks))
        block = np.repeat(blocks, padded)
        self.block_of = np.repeat(np.arange(len(blocks)), padded)
        self.block_of_warp = np.repeat(blocks, self.warps)
        special = {}
        for i, axis in enumerate("xyz"):
            special[f"tid.{axis}"] = thread // int(np.prod(self.block[:i])) % self.block[i]
            special[f"ctaid.{axis}"] = block // int(np.prod(self.grid[:i])) % self.grid[i]
            special[f"ntid.{axis}"], special[f"nctaid.{axis}"] = self.block[i], self.grid[i]
        for name, value in special.items():
            self.registers["%" + name] = np.broadcast_to(np.asarray(value).astype(np.uint32), (self.total,))
        self.shared_stride = -(-max(self.shared_size, 16) // 16) * 16
        # NaN in every format, so that a value that is read before it is written shows
        self.shared = np.full(len(blocks) * self.shared_stride, 0xFF, np.uint8)
        # of sm_100, [blocks, lanes, columns] of 32 bits, from its first allocation on
        self.tensor_memory: np.ndarray | None = None
        end = len(self.kernel.instructions)
        self.pc = np.where(thread < self.threads, 0, end)
        self.waiting = np.zeros(self.total, bool)
        self.exited = self.pc == end

    def _step(self, running: np.ndarray) -> None:
        kernel = self.kernel
        start = int(self.pc[running].min())
        end = kernel.block_ends[start]
        self.active = running & (self.pc == start)
        mask = None if self.active.all() else self.active
        self.active_warps = int(self.active.reshape(-1, WARP).any(axis=1).sum())
        self.executed[start:end] += self.active_warps
        self.pc[self.active] = end
        for x in kernel.instructions[start:end]:
            taking = mask
            if x.guard is not None:
                taking = self.predicate(x.guard)
                if x.negated:
                    taking = ~taking
                taking = np.broadcast_to(taking if mask is None else taking & mask, (self.total,))
                if not taking.any():
                    continue
                if taking.all():
                    taking = None
            INSTRUCTIONS[x.op](self, x, taking)
        self.exited = self.pc == len(kernel.instructions)

    # operands

    def bits(self, operand, size: int) -> np.ndarray:
        """The operand as unsigned integers of `size` bytes, one per thread or one for all."""
        if isinstance(operand, Immediate):
            value = operand.bits
            if operand.kind == "f64" and size == 4:
                value = int(np.float32(np.uint64(value).view(np.float64)).view(np.uint32))
            return np.array([value & ((1 << 8 * size) - 1)], UNSIGNED[size])
        if isinstance(operand, list):
            part = size // len(operand)
            packed = np.zeros(1, UNSIGNED[size])
            for i, element in enumerate(operand):
                packed = packed | self.bits(element, part).astype(UNSIGNED[size]) << UNSIGNED[size](8 * part * i)
            return packed
        values = self.registers.get(operand)
        if values is None:
            values = self._first_read(operand, size)
        return values if values.dtype.itemsize == size and values.dtype != np.bool_ else values.astype(UNSIGNED[size])

    def _first_read(self, name: str, size: int) -> np.ndarray:
        """A symbol, or a register that was never written (zeros)."""
        if name in self.kernel.shared_symbols:
            return np.array([self.kernel.shared_symbols[name]], UNSIGNED[size])
        kind = self.kernel.register_type(name)
        self.registers[name] = np.zeros(self.total, TYPES[kind] if kind == "pred" else UNSIGNED[SIZE[kind]])
        return self.registers[name]

    def each(self, operand, size: int) -> np.ndarray:
        """As `bits`, always one per thread."""
        return np.broadcast_to(self.bits(operand, size), (self.total,))

    def values(self, operand, kind: str) -> np.ndarray:
        """The operand as numbers of a PTX type; bf16 as float32."""
        bits = self.bits(operand, SIZE[kind])
        return bf16_to_float(bits) if kind == "bf16" else bits.view(TYPES[kind])

    def predicate(self, operand) -> np.ndarray:
        if isinstance(operand, Immediate):
            return np.array([bool(operand.bits)])
        if operand[0] == "!":
            return ~self.predicate(operand[1:].strip())
        values = self.registers.get(operand)
        return self._first_read(operand, 1) if values is None else values

    def write(self, destination, values: np.ndarray, mask: np.ndarray | None) -> None:
        """Write a register where `mask` holds; a vector of registers takes the parts of each value."""
        if destination == "_":
            return
        size = values.dtype.itemsize
        if isinstance(destination, list):
            part = size // len(destination)
            whole = values.view(UNSIGNED[size])
            for i, element in enumerate(destination):
                self.write(element, (whole >> UNSIGNED[size](8 * part * i)).astype(UNSIGNED[part]), mask)
            return
        kind = self.kernel.register_type(destination)
        if kind == "pred":
            values = values.astype(bool)
        elif values.dtype == np.bool_:
            values = values.astype(UNSIGNED[SIZE[kind]])
        elif size == SIZE[kind]:
            values = values.view(UNSIGNED[size])
        elif size < SIZE[kind] and values.dtype.kind == "i":
            values = values.astype(f"i{SIZE[kind]}").view(UNSIGNED[SIZE[kind]])
        else:
            values = values.view(UNSIGNED[size]).astype(UNSIGNED[SIZE[kind]])
        values = np.broadcast_to(values, (self.total,))
        if mask is not None:
            before = self.registers.get(destination)
            values = np.where(mask, values, values.dtype.type(0) if before is None else before)
        self.registers[destination] = values

    def by_warp(self, values: np.ndarray) -> np.ndarray:
        """[threads] or [1] -> [warps, 32]."""
        return np.broadcast_to(values, (self.total,)).reshape(-1, WARP)

    # memory

    def access(self, x: Instruction, address: Address, size: int, mask, kind: str) -> Access:
        """Check and count one access of `size` bytes per thread."""
        if any(m.startswith("shared") for m in x.modifiers):
            return self.access_shared(x, address, size, mask, kind)
        if "global" not in x.modifiers:
            raise Unsupported(f"address space of {x.text}")
        cached = not any(m in ("cg", "cv", "volatile", "relaxed", "acquire", "L1__no_allocate") for m in x.modifiers)
        return self.access_global(x, address, size, mask, kind, cached=cached)

    def access_global(self, x: Instruction, address: Address, size: int, mask, kind: str, *, cached: bool) -> Access:
        addresses, lanes = self._addresses(address, mask)
        offsets = addresses - GLOBAL_BASE
        owner = self.memory.owners(offsets, size, x.text)
        self.traffic.access(kind, offsets, lanes, size, owner, self.block_of_warp, cached=cached)
        return Access(self.memory.bytes, offsets, lanes)

    def access_shared(self, x: Instruction, address: Address, size: int, mask, kind: str) -> Access:
        addresses, lanes = self._addresses(address, mask)
        if (addresses & (size - 1)).any():
            raise Fault(f"misaligned shared access: {x.text}")
        if addresses.min() < 0 or addresses.max() + size > self.shared_size:
            raise Fault(f"shared access out of bounds (up to {addresses.max() + size} of {self.shared_size}): {x.text}")
        self.traffic.shared(kind, addresses, lanes, size)
        return Access(self.shared, addresses + self.block_of[lanes] * self.shared_stride, lanes)

    def _addresses(self, address: Address, mask) -> tuple[np.ndarray, np.ndarray]:
        base = np.zeros(1, np.uint64) if address.base is None else self.registers.get(address.base)
        if base is None:
            base = self._first_read(address.base, 4)
        addresses = np.broadcast_to(base.astype(np.int64) + address.offset, (self.total,))
        if mask is None:
            return addresses, np.arange(self.total)
        return addresses[mask], np.flatnonzero(mask)
