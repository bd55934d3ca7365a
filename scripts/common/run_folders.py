"""Run folders: one process holds each, and a failure leaves its mark there."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from ...tasks.runs import write_atomically


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the run folder for the first process of a run, and with it for the others.

    Raises:
        RuntimeError: another process holds it.
    """
    if rank_zero_only.rank > 0:
        yield
        return
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise RuntimeError(f"{folder} is in use by another run: wait for it, or choose another folder with hydra.run.dir=") from None


@contextlib.contextmanager
def mark_failures(folder: Path) -> Iterator[None]:
    """Leave an error in `folder`/error.txt, its message in the first line."""
    mark = folder / "error.txt"
    if rank_zero_only.rank == 0:
        mark.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        # of several processes the first to fail knows the cause
        if not mark.exists():
            write_atomically(mark, f"{type(error).__name__}: {' '.join(str(error).split())}\n\n{traceback.format_exc()}")
        raise
