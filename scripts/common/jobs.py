"""Jobs of a sweep: a repeated sweep continues each job in its folder, and a job that fails or is killed does not stop the others."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig

from ...tasks.runs import write_atomically
from .results import is_finished
from .run_folders import catch_termination, read_config


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


def wait_for(command: list[str]) -> int:
    """Run a command and return its exit status; an exception in the meantime, such as Ctrl-C, ends the command before it goes on."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            # time to write error.txt
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def train_in_subprocess(folder: Path, trust: Iterable[str]) -> None:
    """Train the run of a folder in a separate process, so that a kill does not end the sweep and jobs share no global state.

    A signal that ends the sweep ends the training too.

    Args:
        folder: the run folder, which holds the configuration.
        trust: names that the configuration may contain in addition to those in conf/.

    Raises:
        RuntimeError: the training failed, was killed, or ended without a result.
        SystemExit: the sweep was ended by SIGTERM.
    """
    record = folder / "error.txt"
    record.unlink(missing_ok=True)
    path = str(folder).replace("'", "\\'")
    command = [sys.executable, "-P", "-m", "carafepp.scripts.train", f"resume='{path}'"]
    if names := ",".join(f"'{name}'" for name in trust):
        command.append(f"trust=[{names}]")
    try:
        with catch_termination():
            status = wait_for(command)
    except SIGTERMException as stop:
        raise SystemExit(128 + signal.SIGTERM) from stop
    if status == 0 and is_finished(folder):
        return
    if not record.exists():
        end = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        missing = "" if status else " and without result.json"
        write_atomically(record, f"{end}{missing}, continue it with carafepp-train resume={folder}\n")
    raise RuntimeError(f"{folder}: {record.read_text().splitlines()[0]}")
