"""Trainings, and predictions of them, inside the test's process."""

import json
import sys
from pathlib import Path

import torch
from carafepp.scripts.predict import main as predict_app
from carafepp.scripts.train import train
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf


def run(folder: Path, *overrides: str) -> Path:
    """What `carafepp-train` does with these overrides, without a process of its own."""
    folder.mkdir()
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        cfg = compose("train", overrides=list(overrides))
    OmegaConf.set_struct(cfg, False)
    del cfg.resume
    cfg.run = {"choices": {}, "overrides": list(overrides)}
    OmegaConf.resolve(cfg)
    OmegaConf.save(cfg, folder / "config.yaml")
    train(cfg, folder)
    return folder


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def weights(folder: Path) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def predict(monkeypatch, out: Path, *arguments: object) -> None:
    """What `carafepp-predict` does with these overrides, without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["carafepp-predict", *map(str, arguments), f"hydra.run.dir={out}"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    predict_app()
