"""Run folders: only one run at a time uses a folder, which also records a failure."""

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from ...tasks.writing import remove_partial_files, write_atomically
from .processes import is_first_process
from .trust import check_config, read_yaml

LIGHTNING_EXCEPTIONS = "lightning.pytorch.utilities.exceptions"
# how error.txt begins where a signal ended the run, which is then unfinished rather than failed
INTERRUPTED = "interrupted by"


def read_config(folder: Path, trust: str | Iterable[str] = ()) -> DictConfig:
    """Read the resolved configuration of the run in a folder.

    Raises:
        ValueError: the file is not a configuration, or contains a name that is neither in conf/ nor in `trust`.
    """
    config = read_yaml(folder / "config.yaml")
    check_config(config, trust, str(folder / "config.yaml"))
    return OmegaConf.create(config)


def shorten_path(path: Path) -> Path:
    """Return a path as a user types it: relative if it is below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def is_in_sweep(folder: Path) -> bool:
    """Return whether a run folder is that of a job of a sweep, whose name may have two parts, such as table4/carafe_0."""
    return any((parent / "multirun.yaml").exists() for parent in folder.parents[:2])


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
            remove_partial_files(folder)
            yield
    except Timeout:
        raise RuntimeError(f"{folder} is in use by another run: wait for it, or choose another folder with hydra.run.dir=") from None


class Termination:
    """Handler of SIGTERM and SIGINT that remembers the first signal, and raises a SIGTERMException or KeyboardInterrupt.

    Python ignores an exception in a callback of fork, and other errors can follow a signal. Another SIGTERM does not interrupt the end. A
    training of several processes stops in all of them after a step, as Lightning arranges.
    """

    received: signal.Signals | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        first = self.received is None
        self.received = self.received or signal.Signals(signum)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        # a signal can come before the training has loaded these modules
        processes = sys.modules.get("torch.distributed")
        if first and not (processes and processes.is_initialized()):
            raise getattr(sys.modules.get(LIGHTNING_EXCEPTIONS), "SIGTERMException", SystemExit)


@contextlib.contextmanager
def catch_termination() -> Iterator[Termination]:
    """Handle SIGTERM and SIGINT by a Termination, except where another program handles them, and yield it."""
    termination, before = Termination(), {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    before = {signum: default for signum, default in before.items() if signal.getsignal(signum) == default}
    for signum in before:
        signal.signal(signum, termination)
    try:
        yield termination
    finally:
        for signum, default in before.items():
            signal.signal(signum, default)


def find_signal(stop: BaseException) -> signal.Signals | None:
    """Find the signal behind an exception that ends the process; None means that a program, such as a launcher, has asked for the end."""
    if (exceptions := sys.modules.get(LIGHTNING_EXCEPTIONS)) and isinstance(stop, exceptions.SIGTERMException):
        return signal.SIGTERM
    # Lightning turns the first into the second
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return signal.SIGINT
    return None


def record_reason(record: Path, reason: str) -> None:
    """Write why a run ended, unless its folder cannot be written. Among several processes, the first failure is the cause of the others."""
    if not record.exists():
        with contextlib.suppress(OSError):
            write_atomically(record, reason)


@contextlib.contextmanager
def record_failure(folder: Path) -> Iterator[None]:
    """Write an exception to `folder`/error.txt, with its message in the first line, and raise it again.

    A signal (SIGTERM, or SIGINT as from Ctrl-C) is recorded too, and ends the process with the exit status 128 + signal.
    """
    record = folder / "error.txt"
    if is_first_process():
        record.unlink(missing_ok=True)
    with catch_termination() as termination:
        try:
            yield
        except BaseException as stop:
            # processes that load data can get the signal too, and then their end is an error
            signum = termination.received or find_signal(stop)
            if signum:
                reason = f"{INTERRUPTED} {signum.name}, continue it with carafepp-train resume={folder}"
                record_reason(record, f"{reason}\n")
                if is_first_process():
                    print(f"{folder}: {reason}", file=sys.stderr)
                # exit status 0, as of Lightning's SIGTERMException, would read as success
                raise SystemExit(128 + signum) from stop
            if isinstance(stop, Exception):
                record_reason(record, f"{type(stop).__name__}: {' '.join(str(stop).split())}\n\n{traceback.format_exc()}")
            raise
