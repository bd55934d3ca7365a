"""carafepp-train: train and evaluate one configuration, or resume a run that was cut off."""

import logging
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from ..tasks.pictures import Pictures
from ..tasks.runs import LastCheckpoint, RandomState, RunRecord, write_atomically
from .common.app import app
from .common.checkpoints import drop_weight_paths
from .common.jobs import is_job, repeated_job, shares_process, train_apart
from .common.lightning_output import silence_lightning
from .common.run_folders import lock_folder, mark_failures


def missing_keys(node: object, key: str = "") -> list[str]:
    """List the keys of an unresolved configuration that have no value; OmegaConf's own list stops at interpolations of them."""
    if isinstance(node, dict):
        return [missing for name, child in node.items() for missing in missing_keys(child, f"{key}.{name}".lstrip("."))]
    return [key] if node == "???" else []


def new_run(cfg: DictConfig, folder: Path) -> DictConfig:
    """Resolve the configuration of a run that starts, and keep it in the run folder."""
    first = rank_zero_only.rank == 0
    if first and (folder / "config.yaml").exists():
        raise RuntimeError(f"{folder} already holds a run: continue it with resume={folder}, or choose another folder")
    with mark_failures(folder):
        OmegaConf.set_struct(cfg, False)
        del cfg.resume
        if missing := missing_keys(OmegaConf.to_container(cfg)):
            raise ValueError(f"this configuration needs {', '.join(f'{key}=...' for key in missing)}; scale=small needs no data set")
        choices = {group: choice for group, choice in HydraConfig.get().runtime.choices.items() if not group.startswith("hydra/")}
        cfg.run = {"choices": choices, "overrides": list(HydraConfig.get().overrides.task)}
        OmegaConf.resolve(cfg)
        if first:
            write_atomically(folder / "config.yaml", OmegaConf.to_yaml(cfg))
    return cfg


def resumed_run(folder: Path) -> DictConfig:
    """Read the configuration of a run that continues."""
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"resume={folder} is not a run folder: it has no config.yaml")
    if others := [o for o in HydraConfig.get().overrides.task if not o.startswith("resume=")]:
        raise ValueError(f"resume= continues a run with its own configuration and takes no other override, got {' '.join(others)}")
    return OmegaConf.load(folder / "config.yaml")


def new_logger(cfg: DictConfig, folder: Path) -> object:
    """Build the logger beside metrics.csv, or False if there is none.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    if not cfg.get("logger"):
        return False
    try:
        return instantiate(cfg.logger, save_dir=folder)
    except InstantiationException as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise ModuleNotFoundError(f"{cfg.logger._target_} needs a package: pip install 'carafepp[loggers]'") from error
        raise


def train(cfg: DictConfig, folder: Path) -> None:
    """Run one resolved configuration to its end in `folder`, from its last checkpoint if it has one."""
    silence_lightning()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    config = OmegaConf.to_container(cfg)
    last = folder / "last.ckpt"
    data, task = instantiate(cfg.data), instantiate(drop_weight_paths(config["task"]) if last.exists() else cfg.task)
    if cfg.channels_last:
        task.model.to(memory_format=torch.channels_last)
    if cfg.compile:
        task.model.compile()
    callbacks = [
        RunRecord(folder, cfg.log_every_n_steps, config),
        RandomState(),
        LastCheckpoint(folder, cfg.checkpoint_every_n_steps),
        ModelCheckpoint(folder, filename="best", monitor=task.monitor, mode=task.direction, enable_version_counter=False),
        Pictures(folder),
    ]
    trainer = instantiate(
        cfg.trainer, callbacks=callbacks, logger=new_logger(cfg, folder), log_every_n_steps=cfg.log_every_n_steps, default_root_dir=folder
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(config)
    trainer.fit(task, data, ckpt_path=last if last.exists() else None, weights_only=True)


@app("train")
def main(cfg: DictConfig) -> None:
    """Train in Hydra's output folder, which `resume=FOLDER` makes the folder of an earlier run; a sweep continues what its folder holds."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if rank_zero_only.rank > 0:
        # the first process tells what happens; warnings and errors are everyone's
        logging.disable(logging.INFO)
    with lock_folder(folder):
        if not OmegaConf.is_missing(cfg, "resume"):
            cfg = resumed_run(folder)
        elif is_job() and (folder / "config.yaml").exists():
            cfg = repeated_job(folder)
        else:
            cfg = new_run(cfg, folder)
        if (folder / "result.json").exists():
            rank_zero_only(print)(f"{folder} is finished: see result.json")
            return
        if not shares_process():
            with mark_failures(folder):
                train(cfg, folder)
            rank_zero_only(print)(f"run folder: {folder}")
            return
    train_apart(folder)


if __name__ == "__main__":
    main()
