"""Scenes written to disk are read back by the readers that people use for the real data sets, and damage is reported by file."""

import json
import os

import numpy as np
import pytest
import torch
from carafepp.tasks.ade20k import ADE20K, class_names
from carafepp.tasks.images import read_image
from carafepp.tasks.layouts import LAYOUTS, write_scenes
from carafepp.tasks.scenes import CLASSES, Scenes
from commands import call
from PIL import Image
from pycocotools.coco import COCO
from torchvision.datasets import CocoDetection, ImageFolder, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

SPLITS = {"train": 12, "val": 10}
ARGUMENTS = {**SPLITS, "size": (40, 56), "seed": 2, "objects": (1, 4)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        write_scenes(layout, root / layout, **ARGUMENTS)
    return root


def scenes(split, view):
    return Scenes(split, SPLITS[split], (40, 56), 2, (1, 4), view)


def assert_close(picture, image):
    """JPEG at quality 95 changes an image a little."""
    if isinstance(picture, Image.Image):
        picture = pil_to_tensor(picture).float() / 255
    assert picture.shape == image.shape
    assert (picture - image).abs().mean() < 0.02


@pytest.mark.parametrize("split", SPLITS)
def test_coco_is_read_back(written, split):
    pictures, annotations = written / "coco" / f"{split}2017", written / "coco" / "annotations" / f"instances_{split}2017.json"
    coco, expected = COCO(annotations), scenes(split, "detection")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES[1:])
    assert len(coco.getImgIds()) == len(expected)
    for index, image_id in enumerate(sorted(coco.getImgIds())):
        image, target = expected[index]
        assert_close(Image.open(pictures / coco.loadImgs(image_id)[0]["file_name"]), image)
        found = coco.loadAnns(coco.getAnnIds(image_id))
        assert [a["category_id"] for a in found] == target["labels"].tolist()
        assert [a["area"] for a in found] == target["area"].tolist()
        x, y, w, h = np.array([a["bbox"] for a in found]).T
        assert np.array_equal(np.stack([x, y, x + w, y + h], 1), target["boxes"])
        assert np.array_equal([coco.annToMask(a) for a in found], target["masks"])

    wrapped = wrap_dataset_for_transforms_v2(CocoDetection(pictures, annotations), target_keys=("boxes", "labels", "masks"))
    for (picture, found), (image, target) in zip(wrapped, expected, strict=True):
        assert_close(picture, image)
        assert torch.equal(found["labels"], target["labels"])
        assert torch.equal(found["boxes"], target["boxes"])
        assert torch.equal(found["masks"].bool(), target["masks"])


@pytest.mark.parametrize("split", SPLITS)
def test_ade20k_is_read_back(written, split):
    names = class_names(written / "ade20k")
    assert names == list(CLASSES)
    found, expected = ADE20K(written / "ade20k", split, classes=len(names)), scenes(split, "segmentation")
    for (picture, labels), (image, semantic) in zip(found, expected, strict=True):
        assert picture.dtype == torch.float32
        assert_close(picture, image)
        assert labels.dtype == torch.int64
        assert torch.equal(labels, semantic)


@pytest.mark.parametrize("split", SPLITS)
def test_imagenet_is_read_back(written, split):
    found, expected = ImageFolder(written / "imagenet" / split), scenes(split, "classification")
    assert found.classes == list(CLASSES[1:])
    by_name = {os.path.basename(path): (path, label) for path, label in found.samples}
    assert len(by_name) == len(expected)
    for index, (image, digit) in enumerate(expected):
        path, label = by_name[f"{split}_{index + 1:08d}.JPEG"]
        assert label == digit
        assert_close(Image.open(path), image)


@pytest.mark.parametrize("split", SPLITS)
def test_places365_is_read_back(written, split):
    files, expected = sorted((written / "places365" / split).iterdir()), scenes(split, "photograph")
    for path, image in zip(files, expected, strict=True):
        assert_close(read_image(path), image)


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_interrupted_writing_continues(written, tmp_path, layout, monkeypatch):
    save, saved = Image.Image.save, []

    def fails_in_the_middle_of_a_file(self, path, *args, **kwargs):
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", fails_in_the_middle_of_a_file)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(layout, tmp_path, **ARGUMENTS)
    monkeypatch.setattr(Image.Image, "save", save)
    write_scenes(layout, tmp_path, **ARGUMENTS)
    assert contents(tmp_path) == contents(written / layout)

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    write_scenes(layout, tmp_path, **ARGUMENTS)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}


def test_other_folders_are_left_alone(written, tmp_path):
    with pytest.raises(ValueError, match=r"seed=2, not 3"):
        write_scenes("coco", written / "coco", **{**ARGUMENTS, "seed": 3})
    with pytest.raises(ValueError, match=r"layout=coco, not ade20k"):
        write_scenes("ade20k", written / "coco", **ARGUMENTS)
    (tmp_path / "thesis.tex").write_text("years of work")
    for taken in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(FileExistsError, match=str(taken)):
            write_scenes("coco", taken, **ARGUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="layout must be one of coco, ade20k, imagenet, places365, got 'voc'"):
        write_scenes("voc", tmp_path / "new", **ARGUMENTS)


@pytest.mark.parametrize("text", ['{"layout": ', "[1]", "[" * 100_000, '"\\ud800'])
def test_a_damaged_marker_is_named(tmp_path, text):
    (tmp_path / "scenes.json").write_text(text)
    with pytest.raises(ValueError, match=r"scenes\.json does not say which scenes its folder holds"):
        write_scenes("coco", tmp_path, train=1, val=1, size=64)


def test_command_writes_and_leaves_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("scenes", "layout=places365", "out=pictures", "train=2", "val=1", "size=[16,24]")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    assert {str(path) for path in contents(tmp_path / "pictures")} == {
        "scenes.json",
        "train/00000001.jpg",
        "train/00000002.jpg",
        "val/00000001.jpg",
    }
    assert Image.open(tmp_path / "pictures" / "val" / "00000001.jpg").size == (24, 16)


@pytest.fixture
def ade(tmp_path):
    """An ADE20K folder of three 6 x 4 images (width x height) with labels 0..150."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for name in "abc":
            Image.new("RGB", (6, 4), (200, 100, 50)).save(tmp_path / "images" / split / f"{name}.jpg")
            labels = np.array([0, 1, 2, 75, 149, 150] * 4, np.uint8).reshape(4, 6)
            Image.fromarray(labels).save(tmp_path / "annotations" / split / f"{name}.png")
    return tmp_path


def test_ade20k_labels_are_shifted_and_unlabelled_is_ignored(ade):
    image, labels = ADE20K(ade, "val")[2]
    assert image.shape == (3, 4, 6)
    assert labels[0].tolist() == [255, 0, 1, 74, 148, 149]


def test_ade20k_transforms_are_keyed_by_seed_epoch_and_index(ade):
    crop = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomResizedCrop((3, 3)), v2.ColorJitter(0.5)])

    def items(keys, **options):
        data = ADE20K(ade, "train", crop, **options)
        return {key: [part.tolist() for part in data[key]] for key in keys}

    keys = [(epoch, index) for epoch in range(2) for index in range(3)]
    state = torch.get_rng_state()
    first = items(keys)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert items(keys[::-1]) == first
    assert items([2])[2] == first[0, 2]
    assert len({str(item) for item in [*first.values(), *items(keys, seed=1).values()]}) == 12


def test_ade20k_converts_every_kind_of_image(ade):
    images = ade / "images" / "training"
    Image.new("L", (6, 4), 90).save(images / "a.jpg")
    Image.new("CMYK", (6, 4), (0, 200, 200, 0)).save(images / "b.jpg")
    rotated, exif = Image.new("RGB", (4, 6)), Image.Exif()
    exif[0x0112] = 6
    rotated.save(images / "c.jpg", exif=exif)
    for name, mode in (("d", "RGBA"), ("e", "P"), ("f", "I;16"), ("g", "LA")):
        image = Image.fromarray(np.full((4, 6), 90 * 257, np.uint16)) if mode == "I;16" else Image.new("L", (6, 4), 90).convert(mode)
        image.save(images / f"{name}.png")
        Image.fromarray(np.ones((4, 6), np.uint8)).save(ade / "annotations" / "training" / f"{name}.png")
    data = ADE20K(ade, "train")
    assert len(data) == 7
    for path, (image, labels) in zip(data.images, data, strict=True):
        assert image.shape == (3, 4, 6), path
        assert labels.shape == (4, 6), path
        if path.stem in "adefg":
            assert (image * 255 - 90).abs().max() < 2, path


def damage_image(root):
    path = root / "images" / "training" / "b.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return r"image .*b\.jpg cannot be read"


def damage_annotation(root):
    (root / "annotations" / "training" / "b.png").write_bytes(b"not a picture")
    return r"annotation .*b\.png cannot be read"


def resize_annotation(root):
    Image.new("L", (4, 6)).save(root / "annotations" / "training" / "b.png")
    return r"same size, .*\(4, 6\) of .*b\.jpg and \(6, 4\) of .*b\.png"


def label_out_of_range(root):
    Image.new("L", (6, 4), 151).save(root / "annotations" / "training" / "b.png")
    return r"b\.png has label 151, labels must be in 0\.\.150"


def colour_annotation(root):
    Image.new("RGB", (6, 4)).save(root / "annotations" / "training" / "b.png")
    return r"b\.png must be an 8-bit grey or indexed PNG, got mode RGB"


@pytest.mark.parametrize("damage", [damage_image, damage_annotation, resize_annotation, label_out_of_range, colour_annotation])
def test_ade20k_names_the_damaged_file(ade, damage):
    named = damage(ade)
    data = ADE20K(ade, "train")
    with pytest.raises(ValueError, match=named):
        data[1]
    assert data[0][0].shape == data[2][0].shape


def test_ade20k_names_missing_files(ade):
    (ade / "annotations" / "training" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images have no annotation, the first is .*training.b\.png"):
        ADE20K(ade, "train")
    for path in (ade / "images" / "validation").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"validation holds no images"):
        ADE20K(ade, "val")
    with pytest.raises(FileNotFoundError, match=r"nowhere.*should hold images/ and annotations/"):
        ADE20K(ade / "nowhere", "val")
    with pytest.raises(FileNotFoundError, match=r"objectInfo150\.txt is missing"):
        class_names(ade)
    (ade / "objectInfo150.txt").write_bytes("Idx\tName\n1\tfen\xeatre\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"objectInfo150\.txt must be a text in UTF-8"):
        class_names(ade)
    with pytest.raises(ValueError, match="split must be one of train, val"):
        ADE20K(ade, "training")


def test_coco_annotations_are_what_the_format_demands(written):
    content = json.loads((written / "coco" / "annotations" / "instances_train2017.json").read_text())
    assert {"info", "licenses", "images", "annotations", "categories"} == set(content)
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert len(set(ids)) == len(ids)
    assert min(ids) > 0
    assert all(sum(a["segmentation"]["counts"]) == 40 * 56 for a in content["annotations"])
