"""Annotations with other label values or with colours, mapped on the command line."""

import numpy as np
import pytest
import torch
from carafepp.tasks.ade20k import ADE20K
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image


@pytest.fixture
def write(tmp_path):
    """Return a function that writes one training and one validation image with an annotation, and returns the root folder."""

    def write(annotation: Image.Image):
        for split in ("training", "validation"):
            for kind in ("images", "annotations"):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", annotation.size).save(tmp_path / "images" / split / "a.jpg")
            annotation.save(tmp_path / "annotations" / split / "a.png")
        return tmp_path

    return write


CLASSES = np.array([[0, 1, 1], [2, 0, 1]], np.uint8)
PALETTE = [[0, 0, 0], [128, 64, 128], [0, 0, 255]]


def test_label_values_on_the_command_line(write):
    root = write(Image.fromarray(np.array([0, 255, 7], np.uint8)[CLASSES]))
    with initialize_config_module("carafepp.conf", version_base=None):
        overrides = [f"data.root={root}", "+data.val.labels={0:0,255:1,7:255}", "class_names=[background,crack]"]
        cfg = compose("train", overrides)
    data = instantiate(cfg.data.val)
    assert data.num_classes == 2
    assert torch.equal(data[0][1], torch.tensor([0, 1, 255])[torch.from_numpy(CLASSES).long()])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_on_the_command_line(write, mode):
    indexed = Image.fromarray(2 - CLASSES).convert("P")
    indexed.putpalette([value for color in reversed(PALETTE) for value in color])
    root = write(indexed if mode == "P" else indexed.convert(mode))
    with initialize_config_module("carafepp.conf", version_base=None):
        cfg = compose("train", [f"data.root={root}", f"+data.val.palette={PALETTE}".replace(" ", "")])
    assert torch.equal(instantiate(cfg.data.val)[0][1], torch.from_numpy(CLASSES).long())
    ignored = ADE20K(root, "val", palette=PALETTE, labels={0: 0, 1: 1, 2: 255})
    assert ignored[0][1].max() == 255
    assert ignored.num_classes == 2


def test_other_values_and_colours_are_named(write):
    root = write(Image.fromarray(np.array([0, 255, 7], np.uint8)[CLASSES]))
    with pytest.raises(ValueError, match=r"a.png has label 7, labels must be in 0, 255"):
        ADE20K(root, "val", labels={0: 0, 255: 1})[0]
    root = write(Image.fromarray(np.array(PALETTE, np.uint8)[CLASSES]))
    with pytest.raises(ValueError, match=r"a.png must be an 8-bit grey or indexed PNG, got mode RGB; a palette reads colours"):
        ADE20K(root, "val")[0]
    with pytest.raises(ValueError, match=r"a.png has the colour \[0, 0, 255\], which the palette does not name"):
        ADE20K(root, "val", palette=PALETTE[:2])[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": {0: 0, 300: 1}}, "labels must map 0..255 to classes"),
        ({"labels": {0: "road"}}, "labels must map 0..255 to classes"),
        ({"labels": {0: 255}}, "labels must map a label to a class other than 255"),
        ({"palette": [[0, 0], [1, 1]]}, "palette must be a list of colours"),
        ({"palette": [[0, 0, 0], [0, 0, 256]]}, "palette must be a list of colours"),
        ({"palette": [[0, 0, 0], [0, 0, 0]]}, "palette must have 1 to 256 colours, each once"),
    ],
)
def test_mappings_are_checked(write, options, message):
    root = write(Image.fromarray(CLASSES))
    with pytest.raises(ValueError, match=message):
        ADE20K(root, "val", **options)
