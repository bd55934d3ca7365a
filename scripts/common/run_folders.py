"""Run folders: only one run at a time uses a folder, which also records a failure."""

import contextlib
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from ...tasks.runs import write_atomically
from .trust import check_config, read_yaml


def is_first_process() -> bool:
    """Return whether this process is the only one of a run, or the first of several."""
    return getattr(rank_zero_only, "rank", 0) == 0


def read_config(folder: Path, trust: str | Iterable[str] = ()) -> DictConfig:
    """Read the resolved configuration of the run in a folder.

    Raises:
        ValueError: the file is not a configuration, or contains a name that is neither in conf/ nor in `trust`.
    """
    config = read_yaml(folder / "config.yaml")
    check_config(config, trust, str(folder / "config.yaml"))
    return OmegaConf.create(config)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a run folder in the first process of a run; the other processes of the run rely on this lock.

    Raises:
        RuntimeError: another run has locked the folder.
    """
    if not is_first_process():
        yield
        return
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise RuntimeError(f"{folder} is in use by another run: wait for it, or choose another folder with hydra.run.dir=") from None


@contextlib.contextmanager
def record_failure(folder: Path) -> Iterator[None]:
    """Write an exception to `folder`/error.txt, with its message in the first line, and raise it again."""
    record = folder / "error.txt"
    if is_first_process():
        record.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        # among several processes, the first failure is the cause of the others
        if not record.exists():
            write_atomically(record, f"{type(error).__name__}: {' '.join(str(error).split())}\n\n{traceback.format_exc()}")
        raise
