"""Predictions for other programs have the size of the image file, and are read by the programs that they are for."""

import csv

import numpy as np
import pytest
import torch
from carafepp.tasks.prediction_files import ClassTable, DetectionFile, FilledImages, LabelMapFiles
from PIL import Image
from pycocotools.coco import COCO


def test_label_maps_have_the_size_of_the_image(tmp_path):
    files = LabelMapFiles(tmp_path, ["background", "crack", "stain"])
    files.add("a.jpg", (4, 6), torch.tensor([[0, 1, 2], [2, 2, 255]]))
    files.add("a.png", (2, 3), torch.ones(2, 3, dtype=torch.int64))
    image = Image.open(tmp_path / "labels" / "a.png")
    assert image.mode == "L"
    assert np.array(image).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[2, 2, 2, 2, 255, 255]] * 2
    assert np.array(Image.open(tmp_path / "labels" / "a.png.png")).tolist() == [[1, 1, 1]] * 2
    # a second prediction into the folder replaces these files
    files = LabelMapFiles(tmp_path, ["background", "crack", "stain"])
    files.add("a.jpg", (2, 3), torch.zeros(2, 3, dtype=torch.int64))
    assert not np.array(Image.open(tmp_path / "labels" / "a.png")).any()
    assert files.finish() == tmp_path / "labels"
    assert (tmp_path / "labels" / "classes.txt").read_text() == "background\ncrack\nstain\n"


@pytest.mark.parametrize("masks", [True, False])
def test_detections_are_read_by_pycocotools_in_pixels_of_the_file(tmp_path, masks):
    files = DetectionFile(tmp_path, ["car", "cat"])
    # an image of 40 x 60 pixels that the detector saw at 20 x 30
    found = {"boxes": torch.tensor([[2.0, 3, 12, 9]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.75])}
    found["image_size"] = torch.tensor([20, 30])
    if masks:
        found["masks"] = torch.zeros(1, 1, 20, 30)
        found["masks"][..., 3:9, 2:12] = 1
    files.add("a.jpg", (40, 60), found)
    nothing = {name: value if name == "image_size" else value[:0] for name, value in found.items()}
    files.add("b.jpg", (20, 30), nothing)
    coco = COCO(files.finish())
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["a.jpg", "b.jpg"]
    (entry,) = coco.loadAnns(coco.getAnnIds(catIds=coco.getCatIds(["cat"])))
    assert (entry["image_id"], entry["bbox"], entry["score"]) == (1, [4, 6, 20, 12], 0.75)
    if masks:
        expected = np.zeros((40, 60))
        expected[6:18, 4:24] = 1
        assert (coco.annToMask(entry) == expected).all()
    else:
        assert "segmentation" not in entry


def test_classes_are_a_table(tmp_path):
    files = ClassTable(tmp_path, ["cat", "=dog"])
    files.add("a,b.jpg", (4, 4), torch.tensor([0.25, 0.75]))
    with open(files.finish()) as file:
        assert list(csv.reader(file)) == [
            ["file", "class", "probability", "p(cat)", "p(=dog)"],
            ["a,b.jpg", "'=dog", "0.75", "0.25", "0.75"],
        ]


def test_filled_photographs_keep_their_pixels(tmp_path):
    files = FilledImages(tmp_path)
    pixels = torch.randint(0, 256, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    files.add("a.jpg", (4, 5), pixels / 255)
    assert np.array(Image.open(files.finish() / "a.png")).tolist() == pixels.permute(1, 2, 0).tolist()
