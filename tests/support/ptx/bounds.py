"""What a launch cost: counters, DRAM traffic and the least time that each resource needs for it.

The bounds are a roofline, without latency and without launch overhead: differences under about 30 % are a tie.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .caches import SECTOR
from .machine import Machine


@dataclass(frozen=True)
class GPU:
    multiprocessors: int
    clock: float  # GHz, boost
    dram: float  # GB/s
    l2_size: int  # bytes
    l2_width: int  # bytes per clock, all slices
    l1_size: int  # bytes per multiprocessor, shared memory included
    threads: int  # per multiprocessor

    def resident(self, threads: int, shared: int, most: int = 32) -> int:
        """Number of blocks, with these threads and bytes of shared memory, that one multiprocessor holds; registers allow `most`."""
        return max(1, min(most, self.threads // threads, (self.l1_size - (16 << 10)) // max(1, shared + 1024)))

    def l1(self, threads: int, shared: int, most: int = 32) -> int:
        """Bytes that the shared memory of the resident blocks leaves for caching."""
        taken = self.resident(threads, shared, most) * (shared + 1024 if shared else 0)
        return max(16 << 10, self.l1_size - taken)


A100 = GPU(multiprocessors=108, clock=1.41, dram=2039, l2_size=40 << 20, l2_width=5120, l1_size=192 << 10, threads=2048)
H100 = GPU(multiprocessors=132, clock=1.755, dram=3352, l2_size=50 << 20, l2_width=5632, l1_size=256 << 10, threads=2048)
# code for sm_100 is run for its results: what it would cost on its own GPUs is not modelled
GPUS = {80: A100, 90: H100, 100: H100}
# share of the peak that a copy kernel reaches
DRAM_EFFICIENCY = 0.92


def report(machine: Machine, gpu: GPU, blocks_run: int, blocks_total: int) -> dict:
    """Collect what a launch did; see `execute.run` for the meaning of the entries."""
    traffic, counts = machine.traffic, machine.counts
    categories = Counter()
    for x, executed in zip(machine.kernel.instructions, machine.executed.tolist(), strict=True):
        categories[x.category] += executed
    hits, reads = traffic.l1.hits, traffic.l1.hits + traffic.l1.misses
    stats = {
        "warp_insts": sum(categories.values()),
        "warp_insts_by_class": dict(categories.most_common()),
        **{name: counts[name] for name in sorted(counts)},
        "dram_bytes_compulsory": SECTOR * int(np.count_nonzero(traffic.was_read) + np.count_nonzero(traffic.was_written)),
        "dram_read_bytes": SECTOR * traffic.l2.misses,
        "dram_write_bytes": SECTOR * traffic.l2.written(),
        "l1_hit_rate": hits / reads if reads else None,
        "per_buffer": {name: dict(counter) for name, counter in traffic.buffers.items()},
    }
    stats["dram_bytes"] = stats["dram_read_bytes"] + stats["dram_write_bytes"]
    for kind in ("ld", "st"):
        if counts[f"global_{kind}_requests"]:
            stats[f"sectors_per_{kind}_request"] = counts[f"global_{kind}_sectors"] / counts[f"global_{kind}_requests"]
    times = bounds(stats, gpu, blocks_run, blocks_total)
    return stats | {"bound": times, "limiter": max(times, key=times.get)}


def dram_microseconds(size: int, gpu: GPU) -> float:
    """Least time to move a number of bytes from or to memory."""
    return size / (gpu.dram * 1e3 * DRAM_EFFICIENCY)


def bounds(stats: dict, gpu: GPU, blocks_run: int, blocks_total: int) -> dict[str, float]:
    """Least time in microseconds that each resource needs for the whole grid."""
    get, categories = Counter(stats).__getitem__, Counter(stats["warp_insts_by_class"])
    whole = blocks_total / max(1, blocks_run)
    # a grid smaller than the GPU leaves multiprocessors idle
    cycles = gpu.multiprocessors * gpu.clock * 1e3 * min(1.0, blocks_total / gpu.multiprocessors)
    issued = stats["warp_insts"] - categories["mov"] - categories["ld.param"]
    l2_sectors = get("l2_sectors_read") + get("l2_sectors_write") + get("l2_sectors_atomic")
    memory_requests = get("global_ld_lines") + get("global_st_lines") + get("shared_ld_wavefronts") + get("shared_st_wavefronts")
    times = {
        "dram": dram_microseconds(stats["dram_bytes"], gpu),
        "l2": SECTOR * l2_sectors / (gpu.l2_width * gpu.clock * 1e3),
        "issue": issued / 4 / cycles,
        "mufu": categories["mufu"] * 2 / cycles,
        "lsu": (memory_requests + categories["shuffle/vote"]) / cycles,
    }
    return {name: time * whole for name, time in times.items()}
