"""Semantic segmentation: the paper's protocol on files in ADE20K's layout, and predictions at the size of the images."""

import json

import pytest
import torch
from carafepp.scripts.train import train
from carafepp.tasks.layouts import write_scenes
from carafepp.tasks.segmentation import IGNORED, PadToStride, Segmentation, reduce_labels
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import nn
from torchvision.transforms import v2


def test_protocol_runs_on_ade20k_files(tmp_path):
    write_scenes(layout="ade20k", out=str(tmp_path / "ade"), train=10, val=10, size=72, seed=0, objects=[1, 3])
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        cfg = compose(
            "train",
            overrides=[
                *("backbone=tiny", "samplers=carafe", "model.fpn_dim=16", "model.ppm_dim=8", "trainer.accelerator=cpu"),
                *(f"data.root={tmp_path / 'ade'}", "data.batch_size=4", "data.epochs=1", "data.workers=0"),
                *("data.train.transforms.transforms.0.min_size=[40,56]", "task.inference_resize.size=48"),
                *("trainer.enable_progress_bar=false", "trainer.val_check_interval=1.0"),
            ],
        )
    OmegaConf.set_struct(cfg, False)
    del cfg.resume
    cfg.run = {"choices": {}, "overrides": []}
    OmegaConf.resolve(cfg)
    train(cfg, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 2
    assert 0 <= result["metrics"]["val/pixel_accuracy"] <= 1


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
    assert task.predict(torch.rand(2, 3, *size)).shape == (2, *size)
    height, width = task.draw(torch.rand(3, *size)).shape[1:]
    assert width == size[1]
    # a legend below
    assert height > size[0]


def test_background_and_ignored_pixels_stay_unpainted():
    task = Segmentation(
        lambda num_classes: nn.Conv2d(3, num_classes, 1),
        class_names=["background", "digit"],
        optimizer=torch.optim.SGD,
        schedule=torch.optim.lr_scheduler.PolynomialLR,
    )
    image, labels = torch.rand(3, 6, 6), torch.zeros(6, 6, dtype=torch.long)
    labels[0], labels[1] = 1, IGNORED
    changed = (task.pictures((image, labels))["truth"][:, :6] - image).abs().amax(0) > 0.01
    assert changed[0].any()
    assert not changed[1:].any()
