"""Trainings inside the test's process, and what they leave in their folders."""

import json
from pathlib import Path

import torch
from carafepp.scripts.running.train import train
from configurations import compose_config
from omegaconf import DictConfig, OmegaConf

ON_CPU = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
TINY = [
    "scale=small",
    *("data.train.length=40", "data.train.size=32", "data.val.length=4", "data.val.size=32", "data.val_batch_size=4", "data.epochs=6"),
    *("model.fpn_dim=8", "model.ppm_dim=4", "log_every_n_steps=1", "checkpoint_every_n_steps=2"),
    *(*ON_CPU, "trainer.val_check_interval=1.0"),
]

COMMON = ["scale=small", "data.batch_size=4", "data.val_batch_size=4", "log_every_n_steps=1", "checkpoint_every_n_steps=2", *ON_CPU]
SCENES = [*COMMON, "data.train.length=40", "data.train.size=32", "data.val.length=4", "data.val.size=32"]
# small trainings of every task, in steps of milliseconds, 10 in an epoch
TASKS = {
    "segmentation": [*SCENES, "model.fpn_dim=8", "model.ppm_dim=4"],
    "classification": [*SCENES, "task=classification"],
    "detection": [*SCENES, "task=detection", "model.fpn_dim=8", "model.head_dim=8"],
    "inpainting": [
        *(*COMMON, "task=inpainting", "data.train.images.length=40", "data.train.images.size=32", "data.val.images.length=4"),
        *("data.val.images.size=32", "model.width=4", "task.discriminator.width=4"),
    ],
}


def configure_run(*overrides: str) -> DictConfig:
    """Return the resolved configuration of a run of `carafepp-train` with these overrides."""
    cfg = compose_config("train", *overrides)
    OmegaConf.set_struct(cfg, False)
    del cfg.resume, cfg.trust
    cfg.run = {"choices": {}, "overrides": list(overrides)}
    OmegaConf.resolve(cfg)
    return cfg


def train_in(folder: Path, *overrides: str) -> Path:
    """Run `carafepp-train` with these overrides in this process and in a new folder; return the folder."""
    folder.mkdir()
    cfg = configure_run(*overrides)
    OmegaConf.save(cfg, folder / "config.yaml")
    train(cfg, folder)
    return folder


def read_result(folder: Path) -> dict:
    """Read result.json of a finished run."""
    return json.loads((folder / "result.json").read_text())


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the state dict of the last checkpoint of a run."""
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
