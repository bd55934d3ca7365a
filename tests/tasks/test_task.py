"""The contract of a task: a task that is defined here works with every command, and its monitor's direction selects best.ckpt."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from carafepp.tasks.task import Task
from commands import call
from PIL import Image
from training import read_result

# A user's package: a network, a task and its data.
MODULE = '''
import torch
from carafepp.models.carafe import CARAFE
from carafepp.tasks.task import Task, View
from torch import nn
from torch.nn.functional import avg_pool2d, mse_loss


class Patterns(torch.utils.data.Dataset):
    """Smooth patterns: item (image [3, 16, 16], the same at half the size)."""

    def __init__(self, length, seed=0):
        self.length, self.seed = length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        index = key[1] if isinstance(key, tuple) else key
        image = nn.functional.interpolate(
            torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(1000 * self.seed + index)), 16, mode="bilinear"
        )[0]
        return image, avg_pool2d(image, 2)


class Enlarger(nn.Sequential):
    def __init__(self):
        super().__init__(CARAFE(3, up=2, compressed_channels=4), nn.Conv2d(3, 3, 3, padding=1))


class Enlarging(Task):
    """Double the size of images."""

    monitor = "val/error"
    direction = "min"

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        images, small = batch
        loss = mse_loss(self(small), images)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, small = batch
        self.log("val/error", mse_loss(self(small), images), batch_size=len(images))

    def predict(self, image):
        return self(image[None].to(self.device))[0].cpu().clamp(0, 1)

    def draw(self, image):
        return self.predict(image)

    def view(self, image):
        return View(self.model, (image[None].to(self.device),), image)

    def pictures(self, sample):
        image, small = sample
        return {"image": nn.functional.interpolate(small[None], scale_factor=2)[0], "truth": image, "prediction": self.draw(small)}
'''

CONFIGURATION = {
    "model/enlarger.yaml": "_target_: enlarging.Enlarger\n",
    "task/enlarging.yaml": """
# @package _global_
defaults:
  - override /model: enlarger

task:
  _target_: enlarging.Enlarging
  model: ${model}
  optimizer: ${optimizer}
  schedule: null
""",
    "setting/enlarging_small.yaml": """
# @package _global_
data:
  _target_: carafepp.tasks.data.Data
  train: {_target_: enlarging.Patterns, length: 16, seed: 1}
  val: {_target_: enlarging.Patterns, length: 4}
  batch_size: 4
  epochs: 3
  seed: ${seed}
  val_batch_size: 2

optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 0.01}
""",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a module and a configuration, as in a package of a user."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "enlarging.py").write_text(MODULE)
    for name, text in CONFIGURATION.items():
        path = folder / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def test_every_command_works_with_a_task_of_ones_own(package, tmp_path, capsys):
    folder, quick = tmp_path / "run", ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
    call("train", "--config-dir", package / "conf", "task=enlarging", "scale=small", *quick, f"hydra.run.dir={folder}")
    found = read_result(folder)
    assert (found["steps"], found["flops_input"]) == (12, [3, 16, 16])
    assert found["flops"] > 0
    assert (folder / "pictures.png").exists()
    assert not (folder / "per_class.csv").exists()

    call("eval", f"checkpoint={folder}/best.ckpt", "trust=enlarging", *quick, f"hydra.run.dir={tmp_path}/eval")
    scores = json.loads((tmp_path / "eval" / "eval.json").read_text())["metrics"]
    errors = [point["val/error"] for point in found["curve"]]
    assert scores["val/error"] == pytest.approx(min(errors))

    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "photograph.png")
    predicted = [f"images={tmp_path}/photograph.png", f"checkpoint={folder}/best.ckpt", "trust=enlarging"]
    call("predict", *predicted, f"hydra.run.dir={tmp_path}/predicted")
    assert Image.open(tmp_path / "predicted" / "photograph.png.png").size == (60, 40)
    call("predict", *predicted, "regions='0'", f"hydra.run.dir={tmp_path}/regions")
    assert (tmp_path / "regions" / "photograph.png.png").exists()
    with pytest.raises(ValueError, match=r"masks= is for checkpoints that take masks, and checkpoint=.*best.ckpt takes none"):
        call("predict", *predicted, f"masks={tmp_path}", f"hydra.run.dir={tmp_path}/masked")

    capsys.readouterr()
    call("report", f"runs={folder}", "hydra.run.dir=.")
    assert "error" in capsys.readouterr().out.splitlines()[0].split()
    assert (folder / "compare.png").exists()


def test_a_task_that_misses_something_says_so_at_once(package):
    from enlarging import Enlarging

    class Silent(Enlarging):
        draw = Task.draw

    with pytest.raises(TypeError, match=r"abstract method '?draw"):
        Silent(torch.nn.Identity(), optimizer=torch.optim.Adam, schedule=None)


# Scores of four validations: the second is best for one direction, the third for the other.
SCRIPTED = '''
from enlarging import Enlarging

SCORES = [0.5, 0.2, 0.7, 0.4]


class Smallest(Enlarging):
    """Scores that are known beforehand."""

    def on_validation_epoch_start(self):
        self.validations = self.trainer.global_step // 3

    def validation_step(self, batch, batch_idx):
        self.log(self.monitor, SCORES[self.validations - 1])


class Largest(Smallest):
    monitor, direction = "val/gain", "max"
'''


@pytest.mark.parametrize(("name", "step"), [("Smallest", 6), ("Largest", 9)])
def test_best_checkpoint_is_that_of_the_monitors_direction(package, tmp_path, name, step):
    (package / "scripted.py").write_text(SCRIPTED)
    folder = tmp_path / "run"
    arguments = ["task=enlarging", "scale=small", f"task._target_=scripted.{name}", "trainer.enable_progress_bar=false"]
    call("train", "--config-dir", package / "conf", *arguments, "trainer.accelerator=cpu", f"hydra.run.dir={folder}")
    assert torch.load(folder / "best.ckpt", weights_only=True)["global_step"] == step
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 12


def test_no_command_names_a_task():
    """The commands know tasks by the contract: none of them imports a task or asks for its class."""
    names = [f"tasks.{name}" for name in ("classification", "segmentation", "detection", "inpainting")]
    scripts = Path(__file__).parent.parent.parent / "scripts"
    found = [path.name for path in scripts.rglob("*.py") if any(name in path.read_text() for name in names)]
    assert found == []
