"""Jobs of a sweep: each continues what its folder holds, fails alone, and leaves a mark if it does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ...tasks.runs import write_atomically


def is_job() -> bool:
    """Whether this run is one of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def shares_process() -> bool:
    """Whether this process runs other jobs too: Hydra's launchers do so, but submitit's."""
    return is_job() and "SUBMITIT_EXECUTOR" not in os.environ


def repeated_job(folder: Path) -> DictConfig:
    """Read the configuration that a job left in its folder when the sweep ran before.

    Raises:
        RuntimeError: the folder holds something else.
    """
    cfg = OmegaConf.load(folder / "config.yaml")
    if sorted(cfg.run.overrides) != sorted(HydraConfig.get().overrides.task):
        raise RuntimeError(f"{folder} holds a run of {' '.join(cfg.run.overrides)}: choose another folder with hydra.sweep.dir=")
    return cfg


def train_apart(folder: Path) -> None:
    """Train in a process of its own: if it is killed, the sweep goes on, and no job meets what another has set.

    Raises:
        RuntimeError: it did not come to its end.
    """
    mark = folder / "error.txt"
    mark.unlink(missing_ok=True)
    path = str(folder).replace("'", "\\'")
    status = subprocess.run([sys.executable, "-P", "-m", "carafepp.scripts.train", f"resume='{path}'"]).returncode
    if status and not mark.exists():
        end = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        write_atomically(mark, f"{end}, continue it with carafepp-train resume={folder}\n")
    if status:
        raise RuntimeError(f"{folder}: {mark.read_text().splitlines()[0]}")
