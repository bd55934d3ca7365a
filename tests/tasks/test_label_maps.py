"""Annotations with other label values or with colours, mapped on the command line."""

import struct
import zlib

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


def test_files_that_do_not_keep_labels_are_refused(write):
    root = write(Image.fromarray(CLASSES))
    path = root / "annotations" / "validation" / "a.png"
    big = CLASSES.repeat(20, 0).repeat(20, 1) * 50
    Image.fromarray(big).save(path, "JPEG")
    for options in ({}, {"palette": PALETTE}):
        with pytest.raises(ValueError, match=r"a.png cannot be read: it is a JPEG, which blurs labels: save it as PNG"):
            ADE20K(root, "val", **options)[0]
    # Pillow reads the grey values 0..3 of two bits as 0, 85, 170, 255
    path.write_bytes(grey_png(np.array([[0, 1, 1, 0], [2, 0, 1, 0]]), bits=2))
    with Image.open(path) as file:
        assert np.asarray(file).max() == 170
    for bits in (2, 4):
        path.write_bytes(grey_png(np.array([[0, 1, 1, 0], [2, 0, 1, 0]]), bits))
        with pytest.raises(ValueError, match=r"a.png cannot be read: its grey values have 2 or 4 bits"):
            ADE20K(root, "val")[0]


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """Write values [H, W], W a multiple of 4, as a grey PNG of 2 or 4 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    columns = (values[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(len(values), -1)
    rows = b"".join(b"\0" + np.packbits(row.astype(bool)).tobytes() for row in columns)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("colors", [1, 2, 3, 5, 17])
def test_indexed_files_of_few_colours(write, colors):
    """A palette of few colours is stored with fewer bits, and its labels are those of the file."""
    labels = np.arange(20, dtype=np.uint8).reshape(4, 5) % colors
    indexed = Image.fromarray(labels).convert("P")
    indexed.putpalette([value for label in range(colors) for value in (label, 255 - label, 7)])
    assert torch.equal(ADE20K(write(indexed), "val", labels={label: label for label in range(20)})[0][1], torch.from_numpy(labels).long())


def test_two_images_of_one_annotation_are_named(write):
    root = write(Image.fromarray(CLASSES))
    Image.new("RGB", (3, 2)).save(root / "images" / "validation" / "a.png")
    with pytest.raises(ValueError, match=r"validation has several images for one annotation: a.jpg, a.png"):
        ADE20K(root, "val")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": {0: 0, 300: 1}}, "labels must map 0..255 to classes"),
        ({"labels": {0: "road"}}, "labels must map 0..255 to classes"),
        ({"labels": {0: 255}}, "labels must map a label to a class other than 255"),
        ({"labels": {True: 1}}, "labels must map 0..255 to classes"),
        ({"labels": {"0": 0}}, "labels must map 0..255 to classes"),
        ({"palette": [0, 0, 0]}, "palette must be a list of colours"),
        ({"palette": ["red"]}, "palette must be a list of colours"),
        ({"palette": []}, "palette must have 1 to 256 colours"),
        ({"palette": [[0, 0], [1, 1]]}, "palette must be a list of colours"),
        ({"palette": [[0, 0, 0], [0, 0, 256]]}, "palette must be a list of colours"),
        ({"palette": [[0, 0, 0], [0, 0, 0]]}, "palette must have 1 to 256 colours, each once"),
    ],
)
def test_mappings_are_checked(write, options, message):
    root = write(Image.fromarray(CLASSES))
    with pytest.raises(ValueError, match=message):
        ADE20K(root, "val", **options)
