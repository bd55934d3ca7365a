"""Memory that a call takes beyond what it is given."""

import contextlib
import ctypes
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def keep_freed_memory() -> None:
    """Have the C library (glibc) keep what is freed, as a training process has it after some steps.

    Else whether the pages of an output are new, which costs as much as filling them, depends on what other providers have freed.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        for option, size in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            library.mallopt(option, size)


def measure_extra_bytes(function: Callable[[], tuple[Tensor | None, ...]], device: str) -> int | None:
    """Peak memory of a call beyond what was held before and what it returns; of the whole process on CPU, known on Linux only."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = function()
        return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results if t is not None)
    status = Path("/proc/self/status")
    try:
        # freed memory goes back first, so that what the call takes is seen
        ctypes.CDLL(None).malloc_trim(0)
        before = read_resident_bytes(status, "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    results = function()
    return max(0, read_resident_bytes(status, "VmHWM") - before - sum(t.nbytes for t in results if t is not None))


def read_resident_bytes(status: Path, name: str) -> int:
    """Read an entry of a process's status file that counts resident memory (VmRSS, VmHWM)."""
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class PeakMemory(TorchDispatchMode):
    """Count the bytes of the tensors that are created inside and alive at the same time, at most: `peak`."""

    def __init__(self):
        super().__init__()
        self.live = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.live.add(key)
                weakref.finalize(storage, self._free, key, size)
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
        return out

    def _free(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.bytes -= size


def measure_peak_bytes(run: Callable[[], None], device: str) -> int:
    """Bytes that `run` needs at most beyond those in use before; on a GPU with the workspaces of libraries."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        run()
    return memory.peak
