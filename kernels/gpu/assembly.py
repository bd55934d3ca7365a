"""The assembly of launches: compilation for a GPU that is not present, and the registers, memory and instructions of the code.

The tools are those that Triton ships and uses itself, so that the code is the code that a device would run.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from .launch import Launch
from .tiles.limits import WARP_SIZE
from .tiles.residency import RESIDENCY_LIMITS, resident_blocks

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTC\w*MMA")


class Assembly(NamedTuple):
    """The code of one kernel, as the assembler wrote it."""

    registers: int  # per thread
    spills: int  # instructions that load or store values that did not fit into registers
    loop_spills: int  # those of them that are in a loop
    shared: int  # bytes per block
    warps: int  # per block
    blocks: int  # that one multiprocessor holds, 0 if not even one fits
    limiter: str  # of the blocks: "registers", "shared", "warps" or "blocks"
    occupancy: float  # share of the warps that one multiprocessor holds
    tensor_core: dict[str, int]  # instructions on tensor cores, by name: HMMA, HGMMA (sm_90), UTCHMMA (sm_100)
    widest_load: int  # bits per thread from global memory
    widest_store: int
    barriers: int
    instructions: int


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile a launch for a device of compute capability 80 (for 8.0), 90, ..."""
    return triton.compile(launch.source(), target=GPUTarget("cuda", capability, WARP_SIZE), options=launch.options)


def read_assembly(compiled: CompiledKernel) -> Assembly:
    """Disassemble a kernel and return its resources and instructions.

    Raises:
        subprocess.CalledProcessError: if one of the tools fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        listing = _run("nvdisasm", "-c", cubin)
    code = list(_instructions(listing))
    (registers,) = re.findall(r"REG:(\d+)", usage)
    opcodes = Counter(name.split(".")[0] for name in code)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    blocks, limiter = resident_blocks(compiled.metadata.target.arch, int(registers), shared, warps)
    return Assembly(
        registers=int(registers),
        spills=opcodes["LDL"] + opcodes["STL"],
        loop_spills=count_loop_spills(listing),
        shared=shared,
        warps=warps,
        blocks=blocks,
        limiter=limiter,
        occupancy=blocks * warps / RESIDENCY_LIMITS[compiled.metadata.target.arch].warps,
        tensor_core={name: count for name, count in opcodes.items() if TENSOR_CORE.fullmatch(name)},
        widest_load=max((_width(name) for name in code if name.startswith("LDG")), default=0),
        widest_store=max((_width(name) for name in code if name.startswith("STG")), default=0),
        barriers=opcodes["BAR"],
        instructions=len(code),
    )


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def _instructions(listing: str) -> Iterator[str]:
    """Yield the full opcodes up to the last EXIT; the code after it is padding."""
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.M)
    last = max((i for i, name in enumerate(names) if name == "EXIT"), default=len(names) - 1)
    yield from names[: last + 1]


def count_loop_spills(listing: str) -> int:
    """Return the instructions that load or store spilled values between a label and a branch back to it."""
    labels: dict[str, int] = {}
    spills: list[int] = []
    looped: set[int] = set()
    for number, line in enumerate(listing.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = number
        elif re.search(r"\b(LDL|STL)\b", line):
            spills.append(number)
        elif (branch := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and branch[1] in labels:
            looped.update(spill for spill in spills if spill > labels[branch[1]])
    return len(looped)


def _width(name: str) -> int:
    """Return the bits per thread of LDG.E.128, LDGSTS.E.BYPASS.128, STG.E.U16, LDG.E, ..."""
    parts = re.findall(r"\.[USB]?(8|16|64|128|256)(?=\.|$)", name)
    return int(parts[-1]) if parts else 32
