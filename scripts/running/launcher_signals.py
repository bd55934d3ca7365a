"""Signals of a launcher, such as Slurm's, during a training."""

import signal
import threading

import lightning as L

from ..common.run_folders import Termination


class LauncherSignals(L.Callback):
    """Callback that leaves SIGTERM to a launcher with a handler of its own, instead of Lightning's, which ends the training.

    Slurm sends SIGTERM when the grace time of a preemption begins, and kills and requeues the job when it ends. submitit therefore passes
    over SIGTERM. A training that ends by itself in this time is a failure for Slurm.
    """

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the handler that Lightning has extended by its own."""
        foreign = callable(self.handler) and not isinstance(self.handler, Termination)
        if foreign and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)
