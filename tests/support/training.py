"""Trainings and the other commands inside the test's process."""

import importlib
import json
import sys
from pathlib import Path

import torch
from carafepp.scripts.train import train
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

TINY = [
    "scale=small",
    *("data.train.length=40", "data.train.size=32", "data.val.length=4", "data.val.size=32", "data.val_batch_size=4", "data.epochs=6"),
    *("model.fpn_dim=8", "model.ppm_dim=4", "log_every_n_steps=1", "checkpoint_every_n_steps=2"),
    *("trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "trainer.val_check_interval=1.0"),
]


def rows(folder: Path) -> int:
    path = folder / "metrics.csv"
    return len(path.read_text().splitlines()) if path.exists() else 0


def processes(*words: str) -> list[int]:
    """List the living processes whose command line has all the words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, status = (folder / "cmdline").read_text(), (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if status != "Z" and all(word in line for word in words):
            found.append(int(folder.name))
    return found


def run(folder: Path, *overrides: str) -> Path:
    """Run `carafepp-train` with these overrides in this process."""
    folder.mkdir()
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        cfg = compose("train", overrides=list(overrides))
    OmegaConf.set_struct(cfg, False)
    del cfg.resume, cfg.trust
    cfg.run = {"choices": {}, "overrides": list(overrides)}
    OmegaConf.resolve(cfg)
    OmegaConf.save(cfg, folder / "config.yaml")
    train(cfg, folder)
    return folder


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def weights(folder: Path) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def call(monkeypatch, name: str, *arguments: object) -> None:
    """Run `carafepp-NAME` with these arguments in this process."""
    monkeypatch.setattr(sys, "argv", [f"carafepp-{name}", *map(str, arguments)])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    importlib.import_module(f"carafepp.scripts.{name}").main()


def predict(monkeypatch, out: Path, *arguments: object) -> None:
    """Run `carafepp-predict` with these overrides in this process."""
    call(monkeypatch, "predict", *arguments, f"hydra.run.dir={out}")
