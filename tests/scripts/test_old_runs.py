"""Run folders of version 0.1.0 are resumed, evaluated and predicted with; tests/data/README.md says how they were made."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from carafepp.tasks.lettering import caption
from carafepp.tasks.pictures import enlarge
from commands import call
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from PIL import Image
from training import read_result

DATA = Path(__file__).parent.parent / "data"

# The losses of steps 9 to 20 and the last scores of the same training without the kill, by version 0.1.0.
LOSSES = [2.339398, 2.338424, 2.229045, 2.271801, 2.336001, 2.354561, 2.282756, 2.282797, 2.288240, 2.341699, 2.367607, 2.393673]
TOP1, TOP5 = 5 / 60, 33 / 60


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(DATA / "run_of_0.1.0", tmp_path / "run"))


def test_an_old_run_is_resumed_to_its_end(folder):
    begun = (folder / "metrics.csv").read_text().splitlines()
    call("train", f"resume={folder}")
    lines = (folder / "metrics.csv").read_text().splitlines()
    # the checkpoint is of step 9, the last rows were written after it
    assert lines[:11] == begun[:11]
    losses = [float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]]
    assert len(losses) == 20
    # rounding differs from one processor to another, and the training is in double precision
    assert losses[8:] == pytest.approx(LOSSES, rel=1e-5)
    assert read_result(folder)["steps"] == 20
    assert read_result(folder)["metrics"] == pytest.approx({"val/top1": TOP1, "val/top5": TOP5})
    assert (folder / "best.ckpt").exists()


def test_an_old_checkpoint_is_evaluated(folder):
    out = folder / "eval"
    call("eval", f"checkpoint={folder}/last.ckpt", "trainer.enable_progress_bar=false", f"hydra.run.dir={out}")
    scores = json.loads((out / "eval.json").read_text())["metrics"]
    assert scores == pytest.approx({"val/top1": 6 / 60, "val/top5": 28 / 60})


def test_an_old_checkpoint_predicts(folder):
    rows, columns = np.mgrid[:48, :64]
    pixels = np.stack([columns * 4, rows * 5, rows * columns % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "photograph.png")
    call("predict", f"hydra.run.dir={folder / 'out'}", f"checkpoint={folder}/last.ckpt", f"images={folder}/photograph.png")
    drawn = np.asarray(Image.open(folder / "out" / "photograph.png.png"))
    expected = caption(enlarge(torch.from_numpy(pixels).permute(2, 0, 1) / 255), "8  12%")
    assert (drawn == (expected * 255).round().byte().permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("path", (DATA / "targets_of_0.1.0.txt").read_text().split())
def test_an_old_import_path_leads_somewhere(path):
    assert callable(get_object(path))


@pytest.mark.parametrize("name", ["classification", "segmentation", "detection", "inpainting"])
def test_an_old_configuration_makes_the_same_network(name):
    old = json.loads((DATA / "states_of_0.1.0.json").read_text())[name]
    task = instantiate(OmegaConf.create(old["task"]))
    assert {key: list(value.shape) for key, value in task.state_dict().items()} == old["state"]
