"""tcgen05, the tensor cores of sm_100: one thread multiplies matrices of shared memory into tensor memory, which warps load and store.

Tensor memory has 128 lanes of 32-bit columns, and an address holds the lane above bit 16 and the column below. Warp w of a block reaches
lanes 32 (w % 4) to 32 (w % 4) + 31. A matrix of 128 rows has one in each lane; one of 64 rows has 16 in the first lanes of every warp.
"""

import numpy as np

from .formats import half_to_float, halves
from .machine import WARP, Machine, instruction
from .memory import Fault
from .parser import Address, Instruction, Unsupported
from .warpgroup import read_shared_matrix

LANES, COLUMNS = 128, 512
# kind of a product -> (type of A and B in an instruction descriptor -> its name), depth
KINDS = {"kind__f16": ({0: "f16", 1: "bf16"}, 16), "kind__tf32": ({2: "tf32"}, 8)}


@instruction("elect")
def elect(machine: Machine, x: Instruction, mask):
    """The first active thread of every warp."""
    present = machine.by_warp(machine.active if mask is None else mask)
    first = present & (present.cumsum(axis=1) == 1)
    lane = np.repeat(first.argmax(axis=1).astype(np.uint32), WARP)
    machine.write(x.operands[0].first, lane, mask)
    machine.write(x.operands[0].second, first.reshape(-1), mask)


@instruction("mbarrier")
def barrier_in_memory(machine: Machine, x: Instruction, mask):
    """A barrier for products, which are complete at once."""
    if "try_wait" in x.modifiers:
        machine.write(x.operands[0], np.ones(1, bool), mask)
    elif x.modifiers[0] not in ("init", "inval"):
        raise Unsupported(x.text)


@instruction("tcgen05")
def tensor_instruction(machine: Machine, x: Instruction, mask):
    name = x.modifiers[0]
    if "cta_group__2" in x.modifiers or name not in INSTRUCTIONS:
        raise Unsupported(x.text)
    INSTRUCTIONS[name](machine, x, mask)


def _ignore(machine: Machine, x: Instruction, mask) -> None:
    pass


def _allocate(machine: Machine, x: Instruction, mask) -> None:
    """Write the address of the columns, full of NaN, to shared memory; a block allocates once."""
    if machine.tensor_memory is None:
        machine.tensor_memory = np.full((machine.total // (machine.warps * WARP), LANES, COLUMNS), 0xFFFFFFFF, np.uint32)
    memory, offsets, _ = machine.access_shared(x, x.operands[0], 4, mask, "st")
    memory.view(np.uint32)[offsets // 4] = 0


def _move(machine: Machine, x: Instruction, mask) -> None:
    """Load or store registers of every thread: 32 lanes, or 16 lanes and their columns beyond a distance."""
    loads = x.modifiers[0] == "ld"
    registers, address = (x.operands[0], x.operands[1]) if loads else (x.operands[-1], x.operands[0])
    shape = x.modifiers[3]
    taking = np.flatnonzero(np.ones(machine.total, bool) if mask is None else mask)
    lane, column = (place[taking] for place in _place(machine, address))
    thread = taking % WARP
    if shape == "16x32bx2":
        distance = x.operands[2 if loads else 1].bits
        lane, column = lane + thread % 16, column + thread // 16 * distance
    elif shape == "32x32b":
        lane = lane + thread
    else:
        raise Unsupported(x.text)
    if (lane // WARP != taking // WARP % machine.warps % 4).any():
        raise Fault(f"a warp reaches lanes of another warp: {x.text}")
    memory, block = _memory(machine), machine.block_of[taking]
    registers = registers if isinstance(registers, list) else [registers]
    for i, register in enumerate(registers):
        if loads:
            values = np.zeros(machine.total, np.uint32)
            values[taking] = memory[block, lane, column + i]
            machine.write(register, values, mask)
        else:
            memory[block, lane, column + i] = machine.each(register, 4)[taking]


def _multiply(machine: Machine, x: Instruction, mask) -> None:
    """D = A B + D, or A B, for the thread of each block that takes part; A may be in tensor memory."""
    target, a, b, descriptor, accumulate = x.operands
    threads = np.flatnonzero(mask)
    blocks = machine.block_of[threads]
    words = machine.each(descriptor, 4)[threads]
    word = int(words[0])
    kinds, depth = next(KINDS[m] for m in x.modifiers if m in KINDS)
    kind = kinds.get(word >> 7 & 7)
    # accumulated in float32, both operands of one type, none negated
    if (words != word).any() or word & 0xF != 0 or word >> 4 & 3 != 1 or kind != kinds.get(word >> 10 & 7) or word >> 13 & 3:
        raise Unsupported(f"instruction descriptor {word:#x}: {x.text}")
    columns, rows = (word >> 17 & 0x3F) * 8, (word >> 24 & 0x1F) * 16
    if kind is None or rows not in (64, 128):
        raise Unsupported(f"instruction descriptor {word:#x}: {x.text}")
    machine.counts["mma_flops"] += 2 * rows * columns * depth * len(threads)

    lanes = np.arange(rows) if rows == LANES else np.arange(rows) // 16 * WARP + np.arange(rows) % 16
    memory = _memory(machine)
    if isinstance(a, Address):
        left = _read_operand(memory, blocks, *_at(machine, a, threads, lanes), depth, kind)
    else:
        left = read_shared_matrix(machine, machine.each(a, 8)[threads], blocks, rows, depth, kind, word >> 15 & 1)
    right = read_shared_matrix(machine, machine.each(b, 8)[threads], blocks, columns, depth, kind, word >> 16 & 1)
    lane, column = _at(machine, target, threads, lanes)
    places = blocks[:, None, None], lane[..., None], column[:, None, None] + np.arange(columns)
    keeps = np.broadcast_to(machine.predicate(accumulate), (machine.total,))[threads]
    before = np.where(keeps[:, None, None], memory[places].view(np.float32), 0)
    memory[places] = (left @ right.swapaxes(1, 2) + before).astype(np.float32).view(np.uint32)


def _read_operand(memory: np.ndarray, blocks, lane, column, depth: int, kind: str) -> np.ndarray:
    """[matrices, rows, depth] of A in tensor memory as float32; two numbers of 16 bits are in a column."""
    width = depth if kind == "tf32" else depth // 2
    bits = memory[blocks[:, None, None], lane[..., None], column[:, None, None] + np.arange(width)]
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return np.stack([half_to_float(half, kind) for half in halves(bits)], axis=-1).reshape(*bits.shape[:2], depth)


def _at(machine: Machine, address: Address, threads: np.ndarray, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[threads, rows] lanes and [threads] columns of matrices with these lanes."""
    lane, column = (place[threads] for place in _place(machine, address))
    return lane[:, None] + lanes, column


def _place(machine: Machine, address: Address) -> tuple[np.ndarray, np.ndarray]:
    """Lane and column of an address in every thread."""
    bits = machine.each(address.base, 4).astype(np.int64) + address.offset
    return bits >> 16, bits & 0xFFFF


def _memory(machine: Machine) -> np.ndarray:
    if machine.tensor_memory is None:
        raise Fault("tensor memory is not allocated")
    return machine.tensor_memory


INSTRUCTIONS = {
    "alloc": _allocate,
    "ld": _move,
    "st": _move,
    "mma": _multiply,
    # a product is complete at once, and memory is free when a block ends
    **dict.fromkeys(("relinquish_alloc_permit", "dealloc", "commit", "wait__ld", "wait__st", "fence__before_thread_sync"), _ignore),
    "fence__after_thread_sync": _ignore,
}
