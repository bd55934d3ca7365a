"""Cityscapes: files in its own format are read, and any network trains on them through the same configuration."""

import numpy as np
import pytest
import torch
from carafepp.tasks.cityscapes import Cityscapes
from configurations import compose_config
from PIL import Image
from torchvision import datasets
from training import read_result, train_in


def write(root, split, city, frame, labels, image=None):
    """One image with its annotation, under the names and in the formats of the public archives."""
    height, width = labels.shape
    for kind, name, picture in (
        ("leftImg8bit", "leftImg8bit", np.full((height, width, 3), 100, np.uint8) if image is None else image),
        ("gtFine", "gtFine_labelIds", labels.astype(np.uint8)),
        ("gtFine", "gtFine_instanceIds", labels.astype(np.uint16)),
        ("gtFine", "gtFine_color", np.zeros((height, width, 4), np.uint8)),
    ):
        folder = root / kind / split / city
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{city}_{frame:06d}_000019_{name}.png")


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for split, cities in {"train": ("ulm", "aachen"), "val": ("munster",)}.items():
        for city in cities:
            for frame in range(3):
                labels = rng.integers(0, 34, (5, 8)).repeat(8, 0).repeat(8, 1)
                write(tmp_path, split, city, frame, labels, np.stack([labels * 7] * 3, axis=-1).astype(np.uint8))
    return tmp_path


def test_labels_become_the_classes_of_the_benchmark(tmp_path):
    write(tmp_path, "train", "ulm", 0, np.arange(34).reshape(2, 17))
    image, labels = Cityscapes(tmp_path, "train")[0]
    assert image.shape == (3, 2, 17)
    # the benchmark's 19 classes by the ids of its label definitions
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    expected = torch.full([34], 255)
    expected[ids] = torch.arange(19)
    assert torch.equal(labels.flatten(), expected)


def test_items_are_those_of_torchvision_in_the_order_of_their_names(root):
    ours, theirs = Cityscapes(root, "train"), datasets.Cityscapes(root, target_type="semantic")
    files = {name: index for index, name in enumerate(theirs.images)}
    assert [str(path) for path in ours.images] == sorted(files)
    for index, path in enumerate(ours.images):
        picture, target = theirs[files[str(path)]]
        image, labels = ours[index]
        torch.testing.assert_close(image, torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
        assert torch.equal(labels, torch.tensor([label.train_id for label in theirs.classes])[np.array(target).astype(np.int64)])


def test_damage_is_named(root):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*should hold leftImg8bit/ and gtFine/"):
        Cityscapes(root / "nowhere", "val")
    write(root, "train", "ulm", 1, np.full((4, 4), 40))
    with pytest.raises(ValueError, match=r"ulm_000001_000019_gtFine_labelIds\.png has label 40, labels must be in 0\.\.33"):
        Cityscapes(root, "train")[4]
    (root / "gtFine" / "train" / "ulm" / "ulm_000002_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 6 images have no annotation, the first is .*ulm_000002"):
        Cityscapes(root, "train")


def test_any_network_trains_on_it(root, tmp_path_factory):
    crop = ["data.train.transforms.transforms.0.min_size=[40,56]", "data.train.transforms.transforms.1.size=[32,64]"]
    small = ["backbone=tiny", "decoder.dim=8", "decoder.ppm_dim=8", "decoder.mask_size=7", "data.batch_size=2", "data.epochs=1.3"]
    machine = ["data.workers=0", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.val_check_interval=1.0"]
    folder = train_in(
        tmp_path_factory.mktemp("run") / "run",
        *("experiment=table8", "row=table8/upernet_resnet50_carafe", "setting=segmentation_cityscapes", f"data.root={root}"),
        *(*crop, *small, *machine),
    )
    # a third pass over three batches that is cut off
    assert read_result(folder)["steps"] == 4
    assert len((folder / "per_class.csv").read_text().splitlines()) == 1 + 19


def test_the_setting_names_the_classes_of_the_benchmark():
    names = compose_config("train", "setting=segmentation_cityscapes").class_names
    known = sorted((label.train_id, label.name) for label in datasets.Cityscapes.classes if 0 <= label.train_id < 255)
    assert list(names) == [name for _, name in known]
