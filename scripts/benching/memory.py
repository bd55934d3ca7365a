"""Memory that a call takes in addition to its inputs."""

import contextlib
import ctypes
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def keep_freed_memory() -> None:
    """Make the C library (glibc) keep freed memory, as in a training process after some steps.

    Otherwise the time of a call depends on whether earlier calls have freed pages for its output: new pages cost as much as filling them.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        for option, size in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            library.mallopt(option, size)


def measure_extra_bytes(function: Callable[[], tuple[Tensor | None, ...]], device: str) -> int | None:
    """Measure the peak memory of a call in addition to the memory in use before it and to its results.

    On a CPU this is the resident memory of the process; the result is None on systems other than Linux.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = function()
        return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results if t is not None)
    status = Path("/proc/self/status")
    try:
        # freed memory is returned to the system first, so that the call takes new memory
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
    """Context that tracks the bytes of the live tensors that were created in it; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def measure_peak_bytes(run: Callable[[], object], device: str) -> int:
    """Measure the peak bytes of a call in addition to those in use before it; on a GPU, library workspaces are included."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        run()
    return memory.peak
