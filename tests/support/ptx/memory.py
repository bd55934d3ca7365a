"""Global memory with buffers and faults, shared memory of the resident blocks, and how each access becomes traffic."""

import functools
import mmap
from collections import Counter

import numpy as np

from .caches import LINE, SECTOR, SECTORS_PER_LINE, LRUCache, second_level

GLOBAL_BASE = 0x7F0000000000
ALIGNMENT = 512
BANKS = 32


class Fault(Exception):
    """An error for which a GPU would abort the kernel."""


def untouched(size: int) -> np.ndarray:
    """Zeros that take memory only where they are touched, and may be more than the machine has."""
    # Linux: not in Python's mmap before 3.13
    no_reserve = 0x4000
    return np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve), np.uint8)


class GlobalMemory:
    """One arena that holds every buffer; an access outside every buffer, or a misaligned one, raises Fault."""

    def __init__(self):
        self.buffers: list[tuple[str, int, int]] = []  # name, start, size in bytes, offsets into the arena
        self.size = ALIGNMENT

    def place(self, name: str, size: int) -> int:
        """Reserve a buffer; return its offset. A gap separates it from the next, so that an overrun is a fault."""
        offset = self.size
        self.buffers.append((name, offset, size))
        self.size += (-(-size // ALIGNMENT) + 1) * ALIGNMENT
        return offset

    def allocate(self) -> None:
        self.bytes = untouched(self.size)
        self.starts = np.array([start for _, start, _ in self.buffers], np.int64)
        self.ends = np.array([start + size for _, start, size in self.buffers], np.int64)

    def owners(self, offsets: np.ndarray, size: int, text: str) -> np.ndarray:
        """The buffer of each access of `size` bytes."""
        if (offsets & (size - 1)).any():
            raise Fault(f"misaligned {size}-byte access: {text}")
        owner = np.searchsorted(self.starts, offsets, "right") - 1
        bad = np.flatnonzero((owner < 0) | (offsets + size > self.ends[owner]))
        if len(bad):
            name, start, length = self.buffers[max(int(owner[bad[0]]), 0)]
            place = f"{name} {int(offsets[bad[0]]) - start:+d} of {length} bytes"
            raise Fault(f"global access out of bounds ({len(bad)} lanes, the first at {place}): {text}")
        return owner


class Traffic:
    """Counts requests, sectors and lines as a profiler does, and feeds the caches."""

    def __init__(self, memory: GlobalMemory, l1_size: int, l2_size: int, multiprocessors: int):
        self.memory = memory
        self.counts = Counter()
        self.buffers = {name: Counter() for name, _, _ in memory.buffers}
        sectors = memory.size // SECTOR + 1
        self.was_read, self.was_written = untouched(sectors).view(bool), untouched(sectors).view(bool)
        self.l1 = LRUCache(l1_size, multiprocessors)
        self.l2 = second_level(l2_size, memory.size)
        self.multiprocessors = multiprocessors

    def access(self, kind: str, offsets, lanes, size: int, owner, block_of_warp, *, cached: bool) -> None:
        """Count one instruction.

        Args:
            kind: "ld", "st", "atom" or "red".
            offsets, lanes, owner: of each active thread, the byte offset, the index, the buffer.
            size: bytes per thread, at most 32.
            block_of_warp: block index of each warp.
            cached: whether a load may be served by L1.
        """
        counts = self.counts
        warps = lanes >> 5
        keys = _sorted_distinct((warps << 40) + offsets // SECTOR)
        sectors, warp_of = keys & ((1 << 40) - 1), keys >> 40
        threads = np.bincount(warps)
        threads = threads[threads > 0]
        counts[f"global_{kind}_requests"] += len(threads)
        counts[f"global_{kind}_sectors"] += len(sectors)
        counts[f"global_{kind}_bytes_useful"] += len(offsets) * size
        counts[f"global_{kind}_sectors_ideal"] += int((-(-threads * size // SECTOR)).sum())
        self._per_buffer(kind, sectors, owner, size)
        if kind in ("ld", "atom"):
            self.was_read[sectors[~self.was_written[sectors]]] = True
        if kind != "ld":
            self.was_written[sectors] = True

        starts = np.flatnonzero(np.diff(keys // SECTORS_PER_LINE, prepend=-1))
        counts[f"global_{kind}_lines"] += len(starts)
        masks = np.bitwise_or.reduceat(1 << sectors % SECTORS_PER_LINE, starts)
        lines = sectors[starts] // SECTORS_PER_LINE
        whole = np.zeros(len(lines), np.int64)
        if kind == "st":
            counts["l2_sectors_write"] += len(sectors)
            self.l2.write(whole, lines, masks)
        elif kind != "ld":
            counts["l2_sectors_atomic"] += len(sectors)
            self.l2.read(whole, lines, masks)
            self.l2.write(whole, lines, masks)
        else:
            if cached:
                masks = self.l1.read(block_of_warp[warp_of[starts]] % self.multiprocessors, lines, masks)
                missed = masks != 0
                lines, masks, whole = lines[missed], masks[missed], whole[missed]
            missing = np.bitwise_count(masks).astype(np.int64)
            counts["l2_sectors_read"] += int(missing.sum())
            self._count_missing(lines, missing)
            self.l2.read(whole, lines, masks)

    def _per_buffer(self, kind: str, sectors, owner, size: int) -> None:
        count = len(self.memory.buffers)
        held = np.bincount(np.searchsorted(self.memory.starts, sectors * SECTOR, "right") - 1, minlength=count)
        touched = np.bincount(owner, minlength=count)
        for i in np.flatnonzero(touched):
            buffer = self.buffers[self.memory.buffers[i][0]]
            buffer[f"{kind}_sectors"] += int(held[i])
            buffer[f"{kind}_bytes"] += int(touched[i]) * size

    def _count_missing(self, lines: np.ndarray, missing: np.ndarray) -> None:
        """Count the sectors of each buffer that L1 did not have."""
        # a buffer begins at the start of a line
        owner = np.searchsorted(self.memory.starts, lines * LINE, "right") - 1
        for i, sectors in enumerate(np.bincount(owner, missing, len(self.memory.buffers)).tolist()):
            if sectors:
                self.buffers[self.memory.buffers[i][0]]["l2_sectors"] += int(sectors)

    def shared(self, kind: str, addresses, lanes, size: int) -> None:
        """Count the wavefronts of one shared-memory instruction: one per 32 words, more where words of one bank differ.

        Accesses of 8 and 16 bytes are served by half and quarter warps.
        """
        words = max(1, size // 4)
        of_lane = np.cumsum(np.diff(lanes * words // BANKS, prepend=-1) != 0) - 1
        grid = np.full((of_lane[-1] + 1, BANKS), -1, np.int64)
        column = lanes * words % BANKS
        for i in range(words):
            grid[of_lane, column + i] = addresses // 4 + i
        # the pattern relative to its first row of banks decides, and the same few patterns come again and again
        first = grid.max(axis=1)
        lowest = np.where(grid < 0, first[:, None], grid).min(axis=1)
        relative = np.where(grid < 0, -1, grid - (lowest // BANKS * BANKS)[:, None]).astype(np.int32)
        patterns = Counter(relative.view(np.dtype((np.void, BANKS * 4))).ravel().tolist())
        total = sum(count * wavefronts(pattern) for pattern, count in patterns.items())
        self.counts[f"shared_{kind}_requests"] += int((np.diff(lanes >> 5, prepend=-1) != 0).sum())
        self.counts[f"shared_{kind}_wavefronts"] += total
        self.counts["shared_bank_conflicts"] += total - len(grid)


@functools.lru_cache(maxsize=1 << 16)
def wavefronts(pattern: bytes) -> int:
    """Times the banks are read for 32 int32 word addresses, -1 where a lane asks for nothing."""
    words = np.frombuffer(pattern, np.int32)
    return int(np.bincount(np.unique(words[words >= 0]) % BANKS).max())


def _sorted_distinct(keys: np.ndarray) -> np.ndarray:
    # neighbouring lanes mostly share a sector: drop those before the sort
    keys = keys[np.diff(keys, prepend=-1) != 0]
    if (np.diff(keys) > 0).all():
        return keys
    keys = np.sort(keys)
    return keys[np.diff(keys, prepend=-1) != 0]
