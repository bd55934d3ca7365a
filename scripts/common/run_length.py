"""Runs that continue with another `data.epochs`: their files, and the schedule of the learning rate."""

import json
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from ...tasks.optimization import fast_forward
from ...tasks.writing import write_atomically
from .results import is_finished


def change_length(cfg: DictConfig, epochs: float, folder: Path) -> bool:
    """Set `data.epochs` in the configuration of the run in a folder, and label the run; return whether the length differs.

    Raises:
        FileNotFoundError: the run is finished and its last checkpoint is missing.
        ValueError: the run is finished and longer.
    """
    before = cfg.data.epochs
    if epochs == before:
        return False
    if is_finished(folder):
        if epochs < before:
            raise ValueError(f"data.epochs={epochs} is less than {folder} has trained, data.epochs={before}: give more than {before}")
        if not (folder / "last.ckpt").exists():
            raise FileNotFoundError(f"{folder} cannot be trained longer without its last checkpoint, {folder / 'last.ckpt'}")
    # in reports, such a run is not the same as one of this length from the start
    labels = [label for label in cfg.run.overrides if label.partition("=")[0] != "data.epochs"]
    cfg.run.overrides = [*labels, f"data.epochs={epochs}", f"lengthened_from={before}"]
    cfg.data.epochs = epochs
    return True


def store_config(folder: Path, config: dict) -> None:
    """Write the configuration of a run whose length has changed, and set the result of the shorter run aside.

    The order matters: without its result, a run is unfinished, with the old configuration as well as with the new one.
    """
    path, result = folder / "config.yaml", folder / "result.json"
    text = OmegaConf.to_yaml(OmegaConf.create(config))
    if not path.exists() or path.read_text() == text:
        return
    if is_finished(folder):
        result.rename(folder / f"result_{int(json.loads(result.read_text())['steps'])}_steps.json")
    write_atomically(path, text)


class RunLength(L.Callback):
    """Callback that continues a run whose last checkpoint was written with another `data.epochs`.

    The learning rate continues as the schedule of the new length has it at this step.

    Args:
        folder: the run folder.
        config: the resolved configuration of the run.
    """

    def __init__(self, folder: Path, config: dict) -> None:
        self.folder, self.config = folder, config
        # epochs and steps of the checkpoint, if its length differs
        self.checkpoint: tuple[float, int] | None = None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        """Keep the schedule that is built for the new length.

        Raises:
            ValueError: the new length has no step that is not yet trained, or the checkpoint does not hold its length.
        """
        try:
            before, trained = checkpoint["config"]["data"]["epochs"], checkpoint["global_step"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / 'last.ckpt'} was not written by carafepp-train: it holds no configuration") from error
        epochs = self.config["data"]["epochs"]
        if before == epochs:
            return
        if (steps := trainer.estimated_stepping_batches) <= trained:
            raise ValueError(f"data.epochs={epochs} is {steps} steps, and {self.folder} has trained {trained}: give more")
        self.checkpoint = before, trained
        # a loop whose last batch was the last of the training ends at once
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        # the state of a schedule contains its length
        checkpoint["lr_schedulers"] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the schedule to the step reached, and store the new length in the run folder."""
        if self.checkpoint is not None:
            before, trained = self.checkpoint
            group = trainer.optimizers[0].param_groups[0]
            rate = group["lr"]
            for schedule in trainer.lr_scheduler_configs:
                fast_forward(schedule.scheduler, trained)
            rank_zero_only(print)(
                f"{self.folder}: {trained} of {trainer.estimated_stepping_batches} steps are trained, with data.epochs={before}; "
                f"it continues with data.epochs={self.config['data']['epochs']}, and the learning rate changes from "
                f"{rate:.6g} to {trainer.optimizers[0].param_groups[0]['lr']:.6g}"
            )
        if trainer.is_global_zero:
            store_config(self.folder, self.config)
