"""The programs that one multiprocessor holds at the same time."""

from typing import NamedTuple

from .geometry import multiple
from .limits import WARP_SIZE

# of one multiprocessor
REGISTERS = 65536


class ResidencyLimits(NamedTuple):
    """The limits of one multiprocessor (CUDA programming guide, technical specifications per compute capability)."""

    warps: int
    blocks: int
    shared: int  # bytes; each block takes 1 KiB more than it requests


RESIDENCY_LIMITS = {
    80: ResidencyLimits(64, 32, 164 << 10),
    86: ResidencyLimits(48, 16, 100 << 10),
    89: ResidencyLimits(48, 24, 100 << 10),
    90: ResidencyLimits(64, 32, 228 << 10),
    100: ResidencyLimits(64, 32, 228 << 10),
    120: ResidencyLimits(48, 24, 100 << 10),
}


def resident_blocks(capability: int, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """Return how many blocks one multiprocessor holds at the same time, and the resource that limits them.

    Args:
        capability: 80 for 8.0.
        registers: per thread. A warp takes them in units of 256, and warps are placed four at a time.
        shared: bytes per block.
        warps: per block.

    Raises:
        KeyError: if the limits of the capability are not known.
    """
    most = RESIDENCY_LIMITS[capability]
    limits = {
        "warps": most.warps // warps,
        "registers": REGISTERS // multiple(registers * WARP_SIZE, 256) // 4 * 4 // warps,
        "shared": most.shared // (multiple(shared, 128) + 1024),
        "blocks": most.blocks,
    }
    limiter = min(limits, key=lambda resource: limits[resource])
    return limits[limiter], limiter
