"""Jobs of a sweep: a repeated sweep continues each job in its folder, and a job that fails or is killed does not stop the others."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from .results import is_finished
from .run_folders import read_config, record_reason

# of Linux: the signal that a process gets when its parent ends
PR_SET_PDEATHSIG = 1


def is_job() -> bool:
    """Return whether this run is a job of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def shares_process() -> bool:
    """Return whether this process also runs other jobs, as under every Hydra launcher except submitit's."""
    return is_job() and "SUBMITIT_EXECUTOR" not in os.environ


def read_repeated_job(folder: Path, trust: Iterable[str]) -> DictConfig:
    """Read the configuration that an earlier run of the same sweep left in a job's folder.

    Raises:
        RuntimeError: the folder holds a run with other overrides.
        ValueError: see `read_config`.
    """
    cfg = read_config(folder, trust)
    if sorted(cfg.run.overrides) != sorted(HydraConfig.get().overrides.task):
        raise RuntimeError(f"{folder} holds a run of {' '.join(cfg.run.overrides)}: choose another folder with hydra.sweep.dir=")
    return cfg


def end_with_parent() -> None:
    """Let this process get SIGTERM when its parent ends, even by SIGKILL, which only Linux can do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_dead_sweep() -> None:
    """End a process of a launcher whose sweep was killed: joblib's would wait for other jobs."""
    sweep = multiprocessing.parent_process()
    if sweep is not None and os.getppid() != sweep.pid:
        os._exit(128 + signal.SIGTERM)


class Interruption:
    """A signal that ends a sweep: it ends the trainings of the sweep, and no other begins.

    A launcher such as joblib's runs the jobs in processes of its own. The first process passes the signal on to them and waits until their
    trainings have ended, because joblib would kill them before they have written error.txt.
    """

    def __init__(self) -> None:
        self.signum: signal.Signals | None = None
        # processes that train, below this one
        self.trainings: set[subprocess.Popen] = set()

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Handle SIGTERM or SIGINT; without a training and outside a process of a launcher, the default of the signal applies."""
        if not self.trainings:
            leave_dead_sweep()
        launched = multiprocessing.active_children()
        if not launched and multiprocessing.parent_process() is None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            if not self.trainings:
                signal.signal(signum, signal.SIG_DFL)
                signal.raise_signal(signum)
        self.signum = signal.Signals(signum)
        for process in [*self.trainings, *launched]:
            process.terminate()
        for process in self.trainings:
            # time to write error.txt
            timer = threading.Timer(30, process.kill)
            timer.daemon = True
            timer.start()

    def install(self) -> dict[int, Any]:
        """Install the handler, which only the main thread can do, and return the handlers before."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {signum: signal.signal(signum, self.handle) for signum in (signal.SIGTERM, signal.SIGINT)}


interruption = Interruption()


def check_interruption() -> None:
    """Let no job begin or go on after a signal that ends the sweep.

    Raises:
        SystemExit: the sweep has been interrupted.
        RuntimeError: the same, in a process of a launcher, where Hydra takes it for a failure of the job.
    """
    if interruption.signum is None:
        return
    if multiprocessing.parent_process() is None:
        raise SystemExit(128 + interruption.signum)
    raise RuntimeError(f"the sweep was interrupted by {interruption.signum.name}")


@contextlib.contextmanager
def interruptible_sweep() -> Iterator[None]:
    """Let SIGTERM and SIGINT end the trainings of the sweep that runs in this context, and the process with the status 128 + signal."""
    before = interruption.install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signum, interruption.signum = interruption.signum, None
        if signum is not None:
            raise SystemExit(128 + signum)


def place_bar() -> dict[str, str]:
    """Return the variables of the environment that give a job of a launcher its own line for its bar, as other jobs run beside it."""
    if multiprocessing.parent_process() is None:
        return {}
    return {"TQDM_POSITION": str(HydraConfig.get().job.num % (os.cpu_count() or 1))}


def wait_for(command: list[str]) -> int:
    """Run a command and return its exit status; an exception in the meantime, such as Ctrl-C, ends the command before it goes on."""
    process = subprocess.Popen(command, preexec_fn=end_with_parent, env=os.environ | place_bar())
    interruption.trainings.add(process)
    if interruption.signum is not None:
        # the signal came while the process began
        process.terminate()
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        try:
            # time to write error.txt
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        interruption.trainings.discard(process)
    return status


def train_in_subprocess(folder: Path, trust: Iterable[str]) -> None:
    """Train the run of a folder in a separate process, so that a kill does not end the sweep and jobs share no global state.

    A signal that ends the sweep ends the training too, on Linux also SIGKILL.

    Args:
        folder: the run folder, which holds the configuration.
        trust: names that the configuration may contain in addition to those in conf/.

    Raises:
        RuntimeError: the training failed, was killed, or ended without a result.
        SystemExit: a signal ended the sweep.
    """
    record = folder / "error.txt"
    record.unlink(missing_ok=True)
    path = str(folder).replace("'", "\\'")
    command = [sys.executable, "-P", "-m", "carafepp.scripts.train", f"resume='{path}'"]
    if names := ",".join(f"'{name}'" for name in trust):
        command.append(f"trust=[{names}]")
    if multiprocessing.parent_process() is not None:
        interruption.install()
        end_with_parent()
        # the sweep may have ended while this process began
        leave_dead_sweep()
    status = wait_for(command)
    leave_dead_sweep()
    if status == 0 and is_finished(folder):
        return
    end = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    missing = "" if status else " and without result.json"
    reason = f"{end}{missing}, continue it with carafepp-train resume={folder}"
    record_reason(record, f"{reason}\n")
    check_interruption()
    raise RuntimeError(f"{folder}: {record.read_text().splitlines()[0] if record.exists() else reason}")
