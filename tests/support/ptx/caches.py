"""Caches of 128-byte lines made of four 32-byte sectors: a miss fills one sector, least recently used lines leave first.

A request is one (unit, line, mask) triple: `unit` is the cache that is asked (one L1 per multiprocessor), bit s of `mask` is sector s.
"""

from collections import OrderedDict

import numpy as np

SECTOR = 32
SECTORS_PER_LINE = 4
LINE = SECTOR * SECTORS_PER_LINE


class LRUCache:
    """Exact replacement, request by request."""

    def __init__(self, size: int, units: int = 1):
        self.capacity = max(1, size // LINE)
        self.units = [OrderedDict() for _ in range(units)]  # line -> valid sectors | dirty sectors << 4
        self.hits = self.misses = self.written_back = 0

    def read(self, units: np.ndarray, lines: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """Return the sectors of each request that missed, as masks."""
        missing = masks & ~self._touch(units, lines, masks)
        misses = int(np.bitwise_count(missing).sum())
        self.misses += misses
        self.hits += int(np.bitwise_count(masks).sum()) - misses
        return missing

    def write(self, units: np.ndarray, lines: np.ndarray, masks: np.ndarray) -> None:
        self._touch(units, lines, masks | masks << SECTORS_PER_LINE)

    def _touch(self, units: np.ndarray, lines: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Set `bits` of each line in turn and make it the most recent one; return the states before, 0 for a line that was absent."""
        caches, capacity, before = self.units, self.capacity, []
        for unit, line, added in zip(units.tolist(), lines.tolist(), bits.tolist(), strict=True):
            cache = caches[unit]
            state = cache.get(line)
            if state is not None:
                cache.move_to_end(line)
                cache[line] = state | added
                before.append(state)
                continue
            cache[line] = added
            before.append(0)
            if len(cache) > capacity:
                _, gone = cache.popitem(last=False)
                if gone >> SECTORS_PER_LINE:
                    self.written_back += (gone >> SECTORS_PER_LINE).bit_count()
        return np.array(before, np.int64)

    def written(self) -> int:
        """Sectors that have gone or must still go to memory."""
        return self.written_back + sum((state >> SECTORS_PER_LINE).bit_count() for cache in self.units for state in cache.values())


class RoomyCache:
    """One cache with room for everything, where nothing is ever replaced: the same counts as LRUCache, by array."""

    def __init__(self, lines: int):
        self.valid = np.zeros((lines, SECTORS_PER_LINE), bool)
        self.dirty = np.zeros((lines, SECTORS_PER_LINE), bool)
        self.hits = self.misses = 0

    def read(self, units: np.ndarray, lines: np.ndarray, masks: np.ndarray) -> np.ndarray:
        # the first of several requests for a sector fills it for the others
        missing = np.zeros_like(masks)
        for sector in range(SECTORS_PER_LINE):
            asked = np.flatnonzero(masks >> sector & 1)
            absent = asked[~self.valid[lines[asked], sector]]
            _, first = np.unique(lines[absent], return_index=True)
            missing[absent[first]] |= 1 << sector
            self.valid[lines[absent], sector] = True
            self.misses += len(first)
            self.hits += len(asked) - len(first)
        return missing

    def write(self, units: np.ndarray, lines: np.ndarray, masks: np.ndarray) -> None:
        for sector in range(SECTORS_PER_LINE):
            touched = lines[masks >> sector & 1 == 1]
            self.valid[touched, sector] = self.dirty[touched, sector] = True

    def written(self) -> int:
        return int(np.count_nonzero(self.dirty))


def second_level(size: int, arena: int) -> LRUCache | RoomyCache:
    """The cache that serves an arena of so many bytes."""
    lines = -(-arena // LINE) + 1
    return RoomyCache(lines) if lines <= size // LINE else LRUCache(size)
