"""Loggers in addition to metrics.csv, chosen by an override."""

import csv

import pytest
from omegaconf import OmegaConf
from training import TINY, train_in


def test_tensorboard_gets_what_metrics_csv_gets(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = train_in(tmp_path / "run", *TINY, "data.epochs=1", "data.batch_size=4", "logger=tensorboard")
    found = events.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 10
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(losses)
    assert [event.value for event in found.Scalars("val/mIoU")] == pytest.approx(
        [float(row["val/mIoU"]) for row in rows if row["val/mIoU"]]
    )
    # such tools distinguish runs by their configuration
    assert OmegaConf.load(folder / "tensorboard" / "hparams.yaml").model.fpn_dim == 8


def test_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(ModuleNotFoundError, match=r"WandbLogger needs a package: pip install '\.\[loggers\]'"):
        train_in(tmp_path / "run", *TINY, "data.batch_size=4", "logger=wandb")
