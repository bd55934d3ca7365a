"""Classification in the layout of ImageNet: any kind of JPEG, the recipe of Goyal et al., and runs from the command line."""

import json
import logging

import numpy as np
import pytest
import torch
from carafepp.tasks.classification import Classification
from carafepp.tasks.digits import Digits
from carafepp.tasks.imagenet import ImageNet
from carafepp.tasks.optimization import linear_scaling
from carafepp.tasks.pictures import enlarge
from carafepp.tasks.runs import LastCheckpoint
from commands import call
from configurations import compose_config
from PIL import Image
from torchvision.transforms import v2
from training import ON_CPU, read_result, train_in


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three classes; among the training images one is grey, one CMYK, one cut off."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("n01", "n02", "n03")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((70 + 3 * i, 90, 3), 60 * label + 40, np.uint8) + rng.integers(0, 20, (70 + 3 * i, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.JPEG")
    Image.open(root / "train" / "n01" / "0.JPEG").convert("L").save(root / "train" / "n01" / "0.JPEG")
    Image.open(root / "train" / "n02" / "1.JPEG").convert("CMYK").save(root / "train" / "n02" / "1.JPEG")
    damaged = root / "train" / "n03" / "2.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:500])
    (root / "train" / "n01" / "notes.txt").write_text("no image")
    (root / "train" / "n01" / "._0.JPEG").write_text("what macOS leaves")
    return root


SMALL = [
    "experiment=table2",
    "downsampler=carafe",
    "backbone=tiny",
    "data.batch_size=4",
    "data.epochs=3",
    "data.workers=0",
    "trainer.accelerator=cpu",
]
SMALL += ["num_classes=3", "trainer.enable_progress_bar=false", "checkpoint_every_n_steps=2", "trainer.val_check_interval=1.0"]


def test_table2_trains_resumes_and_evaluates_on_an_imagenet_folder(root, tmp_path, monkeypatch, capsys):
    whole = tmp_path / "whole"
    call("train", *SMALL, f"data.root={root}", f"hydra.run.dir={whole}")
    assert f"{root}/train/n03/2.JPEG cannot be read" in capsys.readouterr().out
    assert read_result(whole)["steps"] == 9
    assert read_result(whole)["metrics"]["val/top5"] == 1  # of three classes

    class Crashed(Exception):
        pass

    def crash(self, trainer, *arguments):
        if trainer.global_step == 5:
            raise Crashed

    saves = LastCheckpoint.on_train_batch_end
    monkeypatch.setattr(LastCheckpoint, "on_train_batch_end", lambda *arguments: (saves(*arguments), crash(*arguments)))
    with pytest.raises(Crashed):
        train_in(tmp_path / "crashed", *SMALL, f"data.root={root}")
    assert torch.load(tmp_path / "crashed" / "last.ckpt", weights_only=True)["global_step"] == 4
    monkeypatch.undo()
    call("train", f"resume={tmp_path}/crashed")
    assert read_result(tmp_path / "crashed")["weights_sha256"] == read_result(whole)["weights_sha256"]

    call("eval", f"checkpoint={whole}/last.ckpt", *ON_CPU, f"hydra.run.dir={tmp_path}/eval")
    scores = json.loads((tmp_path / "eval" / "eval.json").read_text())["metrics"]
    assert scores["val/top1"] == pytest.approx(read_result(whole)["metrics"]["val/top1"])


def test_every_kind_of_jpeg_is_read_and_a_damaged_one_replaced(root, caplog):
    data = ImageNet(root, "train", classes=3)
    assert len(data) == 12
    assert [label for _, label in data.samples] == [0] * 4 + [1] * 4 + [2] * 4
    with caplog.at_level(logging.WARNING):
        items = [data[i] for i in range(12)]
    assert [image.shape for image, _ in items] == [(3, 70 + 3 * (i % 4 + (i == 10)), 90) for i in range(12)]
    assert all(image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1 for image, _ in items)
    # the CMYK image has the colour of its class
    assert items[5][0].mean().item() == pytest.approx(items[4][0].mean().item(), abs=0.02)
    assert "n03/2.JPEG cannot be read" in caplog.text


def test_randomness_is_of_epoch_and_index(root):
    data = ImageNet(root, "train", v2.RandomResizedCrop(24), classes=3)
    first = data[1, 5][0]
    torch.manual_seed(9)
    data[0, 3]
    assert torch.equal(data[1, 5][0], first)
    assert not torch.equal(data[2, 5][0], first)


def test_wrong_layouts_are_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train is missing: root=.* should hold train/ and val/"):
        ImageNet(tmp_path, "train")
    with pytest.raises(ValueError, match="has 3 classes, more than num_classes=2"):
        ImageNet(root, "train", classes=2)
    for name in ("train/a", "train/b", "val/a"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match="must have the same classes, 1 are in only one of them, the first is b"):
        ImageNet(tmp_path, "val")
    (tmp_path / "val" / "b").mkdir()
    with pytest.raises(FileNotFoundError, match=r"class.* b"):
        ImageNet(tmp_path, "val")
    (tmp_path / "val" / "b" / "0.jpg").write_bytes(b"no JPEG")
    with pytest.raises(ValueError, match=r"val/b/0\.jpg cannot be read"):
        ImageNet(tmp_path, "val")[1]


def test_damaged_set_is_an_error(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.jpg").write_bytes(b"no JPEG")
    with pytest.raises(ValueError, match=r"a/0\.jpg cannot be read"):
        ImageNet(tmp_path, "train")[0]


def test_rate_is_that_of_goyal():
    """Batch 1,024 for 90 epochs: from 0.1 to 0.4 in 5 epochs, a tenth at epochs 30, 60 and 80."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = linear_scaling(optimizer, 90 * 25, batch_size=1024)
    rates = {}
    for step in range(90 * 25):
        rates[step / 25] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
    expected = {0: 0.1, 1: 0.16, 5: 0.4, 29: 0.4, 30: 0.04, 59: 0.04, 60: 0.004, 79: 0.004, 80: 0.0004, 89: 0.0004}
    assert {epoch: rates[epoch] for epoch in expected} == pytest.approx(expected)
    # a batch below the reference starts at its own rate
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    linear_scaling(optimizer, 900, batch_size=64)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_scores_are_those_of_a_plain_count():
    class Given(torch.nn.Module):
        def forward(self, x):
            return x

    task = Classification(lambda num_classes: Given(), num_classes=8, optimizer=None, schedule=None)
    logits, labels = torch.randn(40, 8, generator=torch.manual_seed(0)), torch.arange(40) % 8
    task.forward = lambda images: images
    for part in (slice(0, 7), slice(7, 40)):
        task.validation_step((logits[part], labels[part]), 0)
    best = logits.argsort(1, descending=True)
    for k in (1, 5):
        assert task.accuracies[f"top{k}"].compute().item() == pytest.approx((best[:, :k] == labels[:, None]).any(1).float().mean().item())


def test_digits_are_of_their_class_and_repeatable():
    data = Digits("train", size=32, transforms=v2.RandomAffine(10))
    assert data[0][0].shape == (3, 32, 32)
    assert sorted(set(data.labels)) == list(range(10))
    assert torch.equal(data[1, 3][0], data[1, 3][0])
    assert not torch.equal(data[1, 3][0], data[2, 3][0])
    assert 1400 < len(data) < 1500
    assert len(data) + len(Digits("val")) == 1797


def test_pictures_show_class_and_guess():
    task = Classification(
        lambda num_classes: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes)),
        num_classes=4,
        optimizer=None,
        schedule=None,
        inference_transform=v2.Resize((8, 8)),
    )
    image = torch.rand(3, 21, 33)
    drawn = task.draw(image)
    # the image is enlarged to hold the text, which is below
    assert drawn.shape[2] == 330
    assert torch.equal(drawn[:, :210], enlarge(image, 10))
    assert drawn[:, 210:].min() < 0.5


@pytest.mark.parametrize("experiment", ["table2", "table12"])
def test_experiment_is_the_papers_or_small(experiment):
    row = {"table2": "row=table2/resnet50_carafe", "table12": "row=table12/cm16"}[experiment]
    paper = compose_config("train", f"experiment={experiment}", row, "data.root=.")
    small = compose_config("train", f"experiment={experiment}", row, "scale=small", "setting=classification_digits")
    assert (paper.data.batch_size, paper.data.epochs) == (1024, 90)
    assert paper.backbone._target_.endswith("resnet50")
    assert paper.downsampler.compressor_norm
    assert small.backbone._target_.endswith("tiny")
    assert small.task.model.downsample._target_.endswith("CARAFE")
