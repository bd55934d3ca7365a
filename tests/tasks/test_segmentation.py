"""Semantic segmentation: the paper's protocol on files in ADE20K's layout, and predictions at the size of the images."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from carafepp.scripts.common.checkpoints import configure_data, load_task
from carafepp.tasks.ade20k import ADE20K
from carafepp.tasks.data import Data, TrainBatches
from carafepp.tasks.detection import Detection
from carafepp.tasks.layouts import write_scenes
from carafepp.tasks.lettering import pick_size
from carafepp.tasks.segmentation import IGNORED, PadToStride, Segmentation, reduce_labels
from commands import run_command
from configurations import compose_config
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn
from torchvision.transforms import v2
from training import read_result, train_in


def test_protocol_runs_on_ade20k_files(tmp_path):
    write_scenes(layout="ade20k", out=str(tmp_path / "ade"), train=10, val=10, size=72, seed=0, objects=[1, 3])
    folder = train_in(
        tmp_path / "run",
        *("backbone=tiny", "samplers=carafe", "decoder.dim=16", "decoder.ppm_dim=8", "trainer.accelerator=cpu"),
        *(f"data.root={tmp_path / 'ade'}", "data.batch_size=4", "data.epochs=1", "data.workers=0"),
        *("data.train.transforms.transforms.0.min_size=[40,56]", "task.inference_resize.size=48"),
        *("trainer.enable_progress_bar=false", "trainer.val_check_interval=1.0"),
    )
    assert read_result(folder)["steps"] == 2
    assert 0 <= read_result(folder)["metrics"]["val/pixel_accuracy"] <= 1


def test_reduced_labels_stay_in_place():
    generator = torch.Generator().manual_seed(0)
    shifts = []
    for _ in range(200):
        top, left, height, width = torch.randint(8, 24, (4,), generator=generator).tolist()
        labels = torch.zeros(1, 64, 64, dtype=torch.long)
        labels[:, top : top + height, left : left + width] = 1
        whole = reduce_labels(labels, (16, 16)).repeat_interleave(4, 1).repeat_interleave(4, 2)
        shifts.append(whole.nonzero().float().mean(0) - labels.nonzero().float().mean(0))
    # the middle of four pixels is half a pixel off one of them; their first would be 1.5 off
    assert torch.stack(shifts).mean(0).abs().max() < 0.75


def test_samples_of_several_sizes_are_padded_with_ignored_labels():
    samples = [(torch.ones(3, 30, 40), torch.ones(30, 40).long()), (torch.ones(3, 33, 20), torch.ones(33, 20).long())]
    images, labels = PadToStride(32)(samples)
    assert images.shape == (2, 3, 64, 64)
    assert images.sum() == 3 * (30 * 40 + 33 * 20)
    assert (labels == 1).sum() == 30 * 40 + 33 * 20
    assert set(labels.unique().tolist()) == {1, IGNORED}


@pytest.mark.parametrize("size", [(37, 53), (8, 8), (120, 31)])
def test_labels_have_the_size_of_the_image_whatever_size_is_predicted_at(size):
    task = Segmentation(
        lambda num_classes: nn.Conv2d(3, num_classes, 3, stride=4),
        class_names=["background", "digit"],
        optimizer=torch.optim.SGD,
        schedule=torch.optim.lr_scheduler.PolynomialLR,
        inference_resize=v2.Resize(24, max_size=60),
    )
    assert task.predict(torch.rand(3, *size)).shape == size
    height, width = task.draw(torch.rand(3, *size)).shape[1:]
    factor = width // size[1]
    assert width == factor * size[1]
    # a legend below
    assert height > factor * size[0]


def test_background_and_ignored_pixels_stay_unpainted():
    task = Segmentation(
        lambda num_classes: nn.Conv2d(3, num_classes, 1),
        class_names=["background", "digit"],
        optimizer=torch.optim.SGD,
        schedule=torch.optim.lr_scheduler.PolynomialLR,
    )
    image, labels = torch.rand(3, 6, 6), torch.zeros(6, 6, dtype=torch.long)
    labels[0], labels[1] = 1, IGNORED
    pictures = task.pictures((image, labels))
    factor = pictures["image"].shape[1] // 6
    changed = (pictures["truth"][:, : 6 * factor] - pictures["image"]).abs().amax(0) > 0.01
    assert changed[:factor].any()
    assert not changed[factor:].any()


def stub(network, names, **options):
    """The task around a network, without a trainer."""
    task = Segmentation(
        lambda num_classes: network,
        class_names=names,
        optimizer=torch.optim.SGD,
        schedule=torch.optim.lr_scheduler.PolynomialLR,
        **options,
    )
    task.logged = {}
    task.log = lambda name, value, **_: task.logged.update({name: float(value)})
    return task


class Answers(nn.Module):
    """A network that returns given logits."""

    def forward(self, images):
        return self.logits


def scores_by_numpy(pairs, classes):
    """Compute the IoU of every class, their mean and the pixel accuracy by counting one class after another."""
    truth = np.concatenate([labels.ravel() for labels, _ in pairs])
    found = np.concatenate([labels.ravel() for _, labels in pairs])[truth != 255]
    truth = truth[truth != 255]
    iou = []
    for label in range(classes):
        union = np.sum((truth == label) | (found == label))
        iou.append(np.sum((truth == label) & (found == label)) / union if union else None)
    present = [value for value in iou if value is not None]
    return iou, (np.mean(present) if present else np.nan), (np.mean(truth == found) if len(truth) else np.nan)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_scores_are_those_of_a_count_by_numpy(data):
    """Over batches of several sizes, with ignored pixels and classes that are absent from truth, prediction or both."""
    classes = data.draw(st.integers(2, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    occurring = rng.choice(classes, data.draw(st.integers(1, classes)), replace=False)
    task, pairs = stub(Answers(), [str(i) for i in range(classes)]), []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)))
        truth, found = rng.choice([*occurring, 255], shape), rng.choice(rng.choice(classes, 2), shape)
        task.model.logits = torch.nn.functional.one_hot(torch.from_numpy(found), classes).permute(0, 3, 1, 2).float()
        task.validation_step((torch.rand(shape[0], 3, *shape[1:]), torch.from_numpy(truth)), 0)
        pairs.append((truth, found))
    task.on_validation_epoch_end()
    iou, mean, accuracy = scores_by_numpy(pairs, classes)
    assert [row["IoU"] for row in task.per_class] == pytest.approx(iou)
    # tests/tasks/test_boundaries.py has its definition
    boundary = task.logged.pop("val/boundary_IoU")
    assert 0 <= boundary <= 1 or math.isnan(mean)
    assert task.logged == pytest.approx({"val/mIoU": mean, "val/pixel_accuracy": accuracy}, nan_ok=True)
    # the next validation starts from zero
    assert not task.confusion.confmat.any()
    assert not task.boundaries.union.any()


def test_auxiliary_loss_has_its_weight():
    class Twofold(nn.Module):
        def forward(self, images):
            return images[:, :2], images[:, 1:]

    task = stub(Twofold(), ["a", "b"], auxiliary_weight=0.4, mean=[0, 0, 0], std=[1, 1, 1])
    images, labels = torch.randn(2, 3, 5, 4), torch.randint(2, (2, 5, 4))
    labels[0, 0] = IGNORED
    loss = nn.CrossEntropyLoss(ignore_index=IGNORED)
    expected = loss(images[:, :2], labels) + 0.4 * loss(images[:, 1:], labels)
    torch.testing.assert_close(task.training_step((images, labels), 0), expected)


def test_legend_has_the_colours_of_the_classes_that_are_shown():
    task = stub(nn.Conv2d(3, 3, 1), ["background", "a name", "b"])
    image, labels = torch.rand(3, 20, 80), torch.zeros(20, 80, dtype=torch.long)
    labels[:5], labels[5:10] = 1, 2
    pictures = task.pictures((image, labels))
    assert pictures["image"].shape == (3, 80, 320)
    truth, grey = pictures["truth"], pictures["image"].mean(0)
    for label in (1, 2):
        color = torch.tensor(task.colors[label]) / 255
        swatch = (truth[:, 80:] - color[:, None, None]).abs().amax(0) < 1e-3
        assert swatch.sum() == (pick_size(320) - 2) ** 2
        inside = 20 * label - 10
        over = (truth[:, inside] - (0.6 * color[:, None] + 0.4 * grey[inside])).abs().max()
        assert over < 1e-3, "the hue is that of the legend"
        outline = truth[:, 20 * label - 1]
        assert (outline - color[:, None]).abs().max() < 1e-3
    # further lines if one is too narrow, and none without labels that are painted
    narrow = task.pictures((image[..., :4], labels[:, :4]))["truth"]
    assert narrow.shape[1] - 20 * 16 > truth.shape[1] - 80
    assert task.pictures((image, torch.zeros_like(labels)))["truth"].shape == (3, 80, 320)


def test_paper_scale_is_the_protocol_of_the_paper():
    cfg = compose_config("train", "experiment=table8", "row=table8/upernet_resnet50_carafe", "data.root=/nowhere")
    assert len(cfg.class_names) == 150
    images = 20210
    assert len(TrainBatches(images, cfg.data.batch_size, epochs=cfg.data.epochs, seed=0)) == 20 * 5000
    assert (cfg.data.batch_size, cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (16, 0.02, 0.9, 1e-4)
    assert cfg.task.schedule._target_.endswith("PolynomialLR")
    assert cfg.task.schedule.power == 0.9
    assert cfg.trainer.sync_batchnorm
    shortest = instantiate(cfg.data.train.transforms.transforms[0])
    sides = {min(shortest(torch.rand(3, 40, 50)).shape[1:]) for _ in range(60)}
    assert sides == {300, 375, 450, 525, 600}
    assert max(shortest(torch.rand(3, 20, 100)).shape) == 1200
    inference = instantiate(cfg.task.inference_resize)
    assert inference(torch.rand(3, 90, 120)).shape == (3, 450, 600)
    assert inference(torch.rand(3, 20, 100)).shape == (3, 240, 1200)
    assert (cfg.task.scales, cfg.task.flip, cfg.task.window) == ([1.0], False, None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step with seven validation images, which two processes cannot share evenly."""
    overrides = ["scale=small", "data.train.length=4", "data.val.length=7", "data.batch_size=4", "data.val_batch_size=2", "data.epochs=1"]
    overrides += ["data.train.size=32", "data.val.size=32", "decoder.dim=8", "decoder.ppm_dim=8", "trainer.val_check_interval=1.0"]
    return train_in(tmp_path_factory.mktemp("trained") / "run", *overrides, "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")


@pytest.mark.slow
def test_two_processes_score_as_one(trained, tmp_path):
    """The scores are exact: every image is counted once."""
    options = [
        f"checkpoint={trained / 'last.ckpt'}",
        f"hydra.run.dir={tmp_path / 'eval'}",
    ]
    options += ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", "trainer.enable_progress_bar=false"]
    done = run_command("eval", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["metrics"] == read_result(trained)["metrics"]
    table = (tmp_path / "eval" / "per_class.csv").read_text()
    assert table == (trained / "per_class.csv").read_text()
    assert (tmp_path / "eval" / "per_class.png").read_bytes() == (trained / "per_class.png").read_bytes()
    assert sum(int(row["pixels"]) for row in csv.DictReader(table.splitlines())) == 7 * 32 * 32
    # every class is printed with its score, below a header
    assert [line.split()[0] for line in done.stdout.splitlines()[:12]] == ["class", "background", *map(str, range(10))]


def test_a_checkpoint_is_evaluated_with_other_options(trained):
    task, _ = load_task(trained / "last.ckpt", OmegaConf.create({"flip": True, "scales": [1, 1.5], "window": 128}))
    assert task.inference == {"base": None, "scales": [1, 1.5], "flip": True, "window": 128}
    assert load_task(trained / "last.ckpt")[0].inference["flip"] is False
    with pytest.raises(ValueError, match=r"last\.ckpt does not fit a task with .*'class_names': \['a', 'b'\]"):
        load_task(trained / "last.ckpt", OmegaConf.create({"class_names": ["a", "b"]}))


def test_a_checkpoint_is_evaluated_where_its_data_is_now(trained):
    run = OmegaConf.create(
        {"data": {"root": "old/ade/", "val": {"_target_": "X", "root": "old/ade", "file": "old/ade/b.txt", "other": "old/adequate"}}}
    )
    options = OmegaConf.create({"root": "/new", "workers": 0})
    moved = {"_target_": "X", "root": "/new", "file": "/new/b.txt", "other": "old/adequate"}
    assert configure_data(run, options) == {"root": "/new", "workers": 0, "val": moved}
    _, run = load_task(trained / "last.ckpt")
    with pytest.raises(ValueError, match=r"data\.root=/new: the data of the run is not read from a folder, .*Scenes generates it"):
        configure_data(run, options)


def test_every_class_of_the_data_has_a_name(tmp_path):
    write_scenes(layout="ade20k", out=str(tmp_path), train=2, val=1, size=32, seed=0, objects=[1, 1])
    sets = [ADE20K(tmp_path, split, classes=classes) for split, classes in (("train", 3), ("val", 150))]
    task = stub(nn.Conv2d(3, 3, 1), ["a", "b", "c"])
    task.trainer = SimpleNamespace(datamodule=Data(*sets, batch_size=1, epochs=1))
    with pytest.raises(ValueError, match=r"the 150 classes of data\.val, got 3; .*\+data\.val\.classes=3"):
        task.setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 64}, "window must be null or at least 128 pixels, got 64"),
        ({"scales": [1, 0]}, r"scales must be .* got \[1, 0\]"),
        ({"scales": 2}, "scales must be a list .* got 2"),
    ],
    ids=str,
)
def test_impossible_inference_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stub(nn.Conv2d(3, 2, 1), ["a", "b"], **options)


class Auxiliary(nn.Module):
    """A network of two classifiers, the second an auxiliary one."""

    def __init__(self, num_classes):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(3, num_classes, 3, 2, 1) for _ in range(2))

    def forward(self, images):
        logits = [head(images) for head in self.heads]
        return tuple(logits) if self.training else logits[0]


def test_batch_without_a_label_has_no_loss_and_no_gradient():
    task = Segmentation(Auxiliary, class_names=["a", "b", "c"], optimizer=None, schedule=None)
    task.log = lambda *_, **__: None
    images, ignored = torch.rand(2, 3, 16, 16), torch.full((2, 16, 16), IGNORED)
    loss = task.training_step((images, ignored), 0)
    loss.backward()
    assert loss == 0
    assert all((parameter.grad == 0).all() for parameter in task.parameters())


def test_loss_is_the_mean_over_the_labelled_pixels():
    task = Segmentation(Auxiliary, class_names=["a", "b", "c"], optimizer=None, schedule=None)
    task.log = lambda *_, **__: None
    images, labels = torch.rand(2, 3, 16, 16), torch.randint(3, (2, 16, 16))
    labels[0, :9] = IGNORED
    reduced = reduce_labels(labels, (8, 8))
    logits, auxiliary = task(images)
    expected = nn.functional.cross_entropy(logits, reduced, ignore_index=IGNORED)
    expected = expected + 0.4 * nn.functional.cross_entropy(auxiliary, reduced, ignore_index=IGNORED)
    gradients = torch.autograd.grad(expected, list(task.parameters()))
    loss = task.training_step((images, labels), 0)
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(task.parameters(), gradients, strict=True))


def test_numbers_are_names_of_classes():
    """`class_names=[0,1]` on a command line is a list of numbers."""
    task = stub(nn.Conv2d(3, 2, 1), [0, True])
    assert task.class_names == ["0", "True"]
    assert task.draw(torch.rand(3, 20, 30)).shape[2] == 330  # enlarged to hold the names


@pytest.mark.parametrize("names", ["road", "", []])
@pytest.mark.parametrize("task", [Segmentation, Detection])
def test_names_of_classes_are_a_list(task, names):
    with pytest.raises(ValueError, match=r"class_names must be a list of [12] or more names, such as \[cat,dog\], got "):
        task(nn.Identity, class_names=names, optimizer=None, schedule=None)
