"""The bar of a training: steps, passes over the data, the last losses and the last scores."""

import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from ...tasks.data import get_data
from ...tasks.task import Task


class PassesBar(ProgressBar):
    """Progress bar of a training that is one Lightning epoch: it counts optimizer steps, and says in which pass over the data they are.

    A terminal shows every step, with a bar of the validation below. A file, such as that of a Slurm job, gets a line every ten seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.1 if sys.stderr.isatty() else 10.0
        self.bar: tqdm | None = None
        self.validation: tqdm | None = None
        self.scores: dict[str, float] = {}
        self.enabled = True
        # when the losses are shown again
        self.due = 0.0

    def disable(self) -> None:
        """Show nothing; Lightning calls this in all processes except the first."""
        self.enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self.enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the bar."""
        tqdm.write(" ".join(map(str, args)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar, at the step from which the training continues."""
        total = int(trainer.num_training_batches) // trainer.accumulate_grad_batches
        done = count_steps(trainer)
        options: Any = {"unit": "step", "dynamic_ncols": True, "disable": not self.enabled}
        options |= {"mininterval": self.seconds, "maxinterval": max(10, self.seconds)}
        self.bar = tqdm(total=total, initial=done, desc=self.describe(trainer, done), **options)

    def describe(self, trainer: L.Trainer, steps: int) -> str:
        """Say in which pass over the data a step is."""
        data = get_data(trainer)
        pass_ = min(steps // (len(data.train) // data.batch_size) + 1, math.ceil(data.epochs))
        return f"pass {pass_} of {data.epochs:g}"

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar after an optimizer step, with the losses when it is drawn."""
        steps = count_steps(trainer)
        if self.bar is None or steps == self.bar.n:
            return
        # a loss on a GPU is read some times a second only, because reading waits for it
        if time.monotonic() > self.due:
            self.due = time.monotonic() + 0.2
            losses = {k.removeprefix("train/"): float(v) for k, v in trainer.progress_bar_metrics.items() if k.startswith("train/")}
            self.bar.set_description(self.describe(trainer, steps - 1), refresh=False)
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in (losses | self.scores).items()}, refresh=False)
        self.bar.update(steps - self.bar.n)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open a bar of the validation below."""
        if self.bar is not None and sys.stderr.isatty():
            total = sum(map(int, trainer.num_val_batches))
            self.validation = tqdm(total=total, desc="validation", unit="batch", leave=False, dynamic_ncols=True, disable=not self.enabled)

    def on_validation_batch_end(self, *arguments: Any, **options: Any) -> None:
        """Move the bar of the validation."""
        if self.validation is not None:
            self.validation.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar of the validation, and keep its score for the bar of the training."""
        if self.validation is not None:
            self.validation.close()
            self.validation = None
        if isinstance(pl_module, Task) and pl_module.monitor in trainer.callback_metrics:
            self.scores = {pl_module.monitor.removeprefix("val/"): float(trainer.callback_metrics[pl_module.monitor])}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in self.scores.items()})
            self.bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bars, so that a message begins on its own line."""
        for bar in (self.validation, self.bar):
            if bar is not None:
                bar.close()


def count_steps(trainer: L.Trainer) -> int:
    """Count the optimizer steps of the whole training, including those before a continuation."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # pyright: ignore[reportAttributeAccessIssue]
    return batches // trainer.accumulate_grad_batches
