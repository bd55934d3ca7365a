"""The training of a resolved configuration in its run folder."""

from pathlib import Path

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import DoublePrecision
from omegaconf import DictConfig

from ...tasks.averaging import WeightAverage
from ...tasks.checkpoint_files import CheckpointFiles
from ...tasks.pictures import Pictures
from ...tasks.runs import BestCheckpoint, LastCheckpoint, RandomState, RunRecord
from ..common.checkpoints import check_last_checkpoint, drop_weight_paths
from ..common.lightning_messages import silence_lightning
from ..common.options import read_options
from ..common.run_length import RunLength
from ..common.trust import find_foreign
from .ending import describe_run
from .launcher_signals import LauncherSignals
from .progress import PassesBar


def build_logger(cfg: DictConfig, folder: Path) -> Logger | bool:
    """Build the logger that supplements metrics.csv, or return False if the configuration has none.

    Raises:
        ModuleNotFoundError: the package of the logger is not installed.
    """
    if not cfg.get("logger"):
        return False
    try:
        return instantiate(cfg.logger, save_dir=folder)
    except InstantiationException as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise ModuleNotFoundError(f"{cfg.logger._target_} needs a package: pip install '.[loggers]' in a checkout") from error
        raise


def train(cfg: DictConfig, folder: Path) -> None:
    """Train a resolved configuration to its end in `folder`, from the last checkpoint in this folder if there is one."""
    silence_lightning()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    config = read_options(cfg)
    last = folder / "last.ckpt"
    if last.exists():
        check_last_checkpoint(folder)
    data, task = instantiate(cfg.data), instantiate(drop_weight_paths(config["task"]) if last.exists() else cfg.task)
    if cfg.channels_last:
        task.model.to(memory_format=torch.channels_last)
    if cfg.compile:
        task.model.compile()
    bar = [PassesBar()] if cfg.trainer.get("enable_progress_bar") else []
    # runs from before this key have none
    averaging = cfg.get("averaging")
    callbacks = [
        *bar,
        # the other callbacks see the average
        *([] if averaging is None else [WeightAverage(averaging)]),
        # result.json, which RunRecord writes, says that everything else is written
        Pictures(folder),
        RunRecord(folder, cfg.log_every_n_steps, config),
        RandomState(),
        RunLength(folder, config),
        LauncherSignals(),
        BestCheckpoint(folder, task.monitor, task.direction),
        LastCheckpoint(folder, cfg.checkpoint_every_n_steps),
    ]
    trainer = instantiate(
        cfg.trainer, callbacks=callbacks, logger=build_logger(cfg, folder), log_every_n_steps=cfg.log_every_n_steps, default_root_dir=folder
    )
    trainer.strategy.checkpoint_io = CheckpointFiles()
    for logger in trainer.loggers:
        logger.log_hyperparams(config)
    if isinstance(trainer.precision_plugin, DoublePrecision):
        # Lightning converts the module after it has restored the weights, which would round them to 32 bits
        task.double()
    trainer.fit(task, data, ckpt_path=last if last.exists() else None, weights_only=True)
    if trainer.is_global_zero and (folder / "result.json").exists():
        print(describe_run(folder, task, find_foreign(config)))
