"""Compiling launches for a GPU that need not be there, and reading what the assembler made of them.

The tools are those that Triton ships and uses itself; the code that is read is the code that a device would run.
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

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WARP = 32
REGISTERS = 65536
TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTC\w*MMA")


class ResidencyLimits(NamedTuple):
    """What one multiprocessor holds at most (CUDA programming guide, technical specifications per compute capability)."""

    warps: int
    blocks: int
    shared: int  # bytes; a block takes 1 KiB beside its own


RESIDENCY_LIMITS = {
    80: ResidencyLimits(64, 32, 164 << 10),
    86: ResidencyLimits(48, 16, 100 << 10),
    89: ResidencyLimits(48, 24, 100 << 10),
    90: ResidencyLimits(64, 32, 228 << 10),
    100: ResidencyLimits(64, 32, 228 << 10),
    120: ResidencyLimits(48, 24, 100 << 10),
}


class Assembly(NamedTuple):
    """One compiled kernel as the assembler left it."""

    registers: int  # per thread
    spills: int  # instructions that load or store what did not fit into registers
    shared: int  # bytes per block
    warps: int  # per block
    blocks: int  # that one multiprocessor holds, 0 where not even one fits
    limiter: str  # what allows no more: "registers", "shared", "warps" or "blocks"
    occupancy: float  # share of the warps that one multiprocessor holds
    tensor_core: dict[str, int]  # instructions on tensor cores, by name: HMMA, HGMMA (sm_90), UTCHMMA (sm_100)
    widest_load: int  # bits per thread from global memory
    widest_store: int
    barriers: int
    instructions: int


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile for compute capability 80, 90, ... as the launch would be on that device."""
    return triton.compile(launch.source(), target=GPUTarget("cuda", capability, WARP), options=launch.options)


def read_assembly(compiled: CompiledKernel) -> Assembly:
    """Disassemble a kernel and say what it needs."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        code = list(_instructions(_run("nvdisasm", "-c", cubin)))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    opcodes = Counter(name.split(".")[0] for name in code)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    blocks, limiter = resident_blocks(compiled.metadata.target.arch, registers, shared, warps)
    return Assembly(
        registers=registers,
        spills=opcodes["LDL"] + opcodes["STL"],
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


def resident_blocks(capability: int, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """Blocks that one multiprocessor holds at the same time, and what allows no more.

    Args:
        registers: per thread; warps take them by 256, and are placed four at a time.
        shared: bytes per block.
        warps: per block.
    """
    most = RESIDENCY_LIMITS[capability]
    by_registers = REGISTERS // (-(-registers * WARP // 256) * 256) // 4 * 4 // warps
    limits = {
        "warps": most.warps // warps,
        "registers": by_registers,
        "shared": most.shared // (-(-shared // 128) * 128 + 1024),
        "blocks": most.blocks,
    }
    limiter = min(limits, key=limits.get)
    return limits[limiter], limiter


def _run(tool: str, *arguments) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def _instructions(listing: str) -> Iterator[str]:
    """Full opcodes up to the last EXIT: what follows only fills the last line of code."""
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.M)
    last = max((i for i, name in enumerate(names) if name == "EXIT"), default=len(names) - 1)
    yield from names[: last + 1]


def _width(name: str) -> int:
    """Bits per thread of LDG.E.128, LDGSTS.E.BYPASS.128, STG.E.U16, LDG.E, ..."""
    parts = re.findall(r"\.[USB]?(8|16|64|128|256)(?=\.|$)", name)
    return int(parts[-1]) if parts else 32
