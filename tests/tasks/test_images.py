"""Image files of any kind and range, and the folders that are passed over."""

import io
import logging
import subprocess
import tarfile

import numpy as np
import pytest
from carafepp.tasks.cityscapes import Cityscapes
from carafepp.tasks.imagenet import SORT, ImageNet
from carafepp.tasks.images import read_converted, read_image
from carafepp.tasks.places import Places
from PIL import Image

RAMP = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
BYTES = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP, BYTES),
        (RAMP / 2, (BYTES / 2).round()),
        (BYTES.astype(np.float32), BYTES),
        (np.zeros((16, 16), np.float32), np.zeros((16, 16))),
        (BYTES.astype(np.int32), BYTES),
        (BYTES.astype(np.int32) * 257, BYTES),
        (BYTES.astype(np.uint16) * 257, BYTES),
        (BYTES.astype(np.uint16), BYTES),
        ((BYTES > 99).astype(np.uint16) * 255, (BYTES > 99) * 255),
    ],
    ids=[
        "floats",
        "dark floats",
        "floats of bytes",
        "black floats",
        "integers of bytes",
        "integers of 16 bits",
        "16 bits",
        "bytes in 16",
        "mask in 16",
    ],
)
def test_ranges_that_are_evident_are_scaled(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode in ("F", "I", "I;16")
    image = read_image(tmp_path / "a.tif")
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP * 4000, "mode F, 32-bit floats, must have values from 0 to 1, or whole numbers from 0 to 255, got 0.0 to 4000.0"),
        (RAMP * 1.2, "mode F, 32-bit floats"),
        (RAMP - 0.5, "got -0.5 to 0.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "got nan to nan"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), "got 0.0 to inf"),
        (BYTES.astype(np.int32) * 1000, "mode I, 32-bit integers, must have values from 0 to 65,535, got 0 to 255000"),
        (BYTES.astype(np.int32) - 5, "got -5 to 250"),
    ],
)
def test_other_ranges_are_refused_by_mode(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"image .*a.tif cannot be read: .*{message}"):
        read_image(tmp_path / "a.tif")


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


HIDDEN = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", ".hidden")


def test_hidden_folders_are_no_classes(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "0.png")
            picture(tmp_path / split / name / "deeper" / "1.png")
            picture(tmp_path / split / name / ".2.png")
            for hidden in HIDDEN:
                picture(tmp_path / split / name / hidden / "0-checkpoint.png")
    for hidden in HIDDEN:
        picture(tmp_path / "train" / hidden / "0-checkpoint.png")
    for split in ("train", "val"):
        data = ImageNet(tmp_path, split, classes=2)
        assert data.class_names == ["cat", "dog"]
        names = [f"{tmp_path}/{split}/{name}" for name in ("cat/0.png", "cat/deeper/1.png", "dog/0.png", "dog/deeper/1.png")]
        assert data.samples == list(zip(names, (0, 0, 1, 1), strict=True))


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    for name in ("train/cat/0.png", "train/dog/1.png", "elsewhere/deep/2.png"):
        picture(tmp_path / name)
    for place, target in (
        ("train/cat/self", "../cat"),
        ("train/cat/all", ".."),
        ("train/cat/root", "../.."),
        ("train/cat/more", "../../elsewhere"),
        ("elsewhere/deep/back", "../../train/cat"),
        ("elsewhere/dangling.png", "nowhere"),
    ):
        (tmp_path / place).symlink_to(target)
    # reading a dangling link is an error, which is better than silence
    of_cats = ["train/cat/0.png", "train/cat/more/dangling.png", "train/cat/more/deep/2.png"]
    data = ImageNet(tmp_path, "train", classes=2)
    assert data.samples == [*((f"{tmp_path}/{name}", 0) for name in of_cats), (f"{tmp_path}/train/dog/1.png", 1)]
    assert sorted(Places(tmp_path, "train").names) == sorted(path for path, _ in data.samples)


def test_images_of_every_kind_are_found_and_other_files_are_not(tmp_path):
    found = ["A.JPG", "b.Jpeg", "c.jfif", "d.PNG", "e.bmp", "f.webp", "g.tif", "h.TIFF", "i.ppm", "j.pgm", "k.gif"]
    for name in found:
        picture(tmp_path / "val" / name) if not name.endswith("jfif") else Image.new("RGB", (8, 8)).save(tmp_path / "val" / name, "JPEG")
    for name in ("Thumbs.db", "._A.JPG", ".DS_Store", "desktop.ini", "notes.txt", "A.JPG.part", "A.xml"):
        (tmp_path / "val" / name).write_bytes(b"")
    data = Places(tmp_path, "val")
    assert [name.rpartition("/")[2] for name in data.names] == sorted(found)
    assert all(data[index].shape == (3, 8, 8) for index in range(len(data)))


def test_file_without_content_is_named(tmp_path):
    picture(tmp_path / "train" / "cat" / "0.png")
    (tmp_path / "train" / "cat" / "1.jpg").write_bytes(b"")
    (tmp_path / "train" / "cat" / "2.jpg").symlink_to("2.jpg")
    (tmp_path / "train" / "dog").symlink_to("dog")
    data = ImageNet(tmp_path, "train", classes=1)
    data.skip_damaged = False
    for index, name in ((1, "1.jpg"), (2, "2.jpg")):
        with pytest.raises(ValueError, match=f"image .*{name} cannot be read"):
            data[index]


def test_tiff_without_its_last_strips_is_named(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(BYTES).save(path)
    content = path.read_bytes()
    # the entry of the height: tag 257, one integer
    entry = content.index(b"\x01\x01\x04\x00\x01\x00\x00\x00")
    path.write_bytes(content[: entry + 8] + (24).to_bytes(4, "little") + content[entry + 12 :])
    with pytest.raises(ValueError, match=r"a.tif cannot be read: the file holds 16 x 16 of its 16 x 24 pixels"):
        read_image(path)


@pytest.mark.parametrize(("error", "message"), [(MemoryError, "there is not enough memory for 16 x 16 pixels"), (EOFError, "EOFError$")])
def test_errors_without_a_message_are_named(error, message, tmp_path):
    Image.fromarray(BYTES).save(tmp_path / "a.png")

    def convert(image):
        raise error

    with pytest.raises(ValueError, match=rf"mask .*a.png cannot be read: {message}"):
        read_converted(tmp_path / "a.png", "mask", convert)


def test_hidden_folders_hold_no_photographs(tmp_path):
    for name in ("0.png", "a/1.png", *(f"{hidden}/0-checkpoint.png" for hidden in HIDDEN), "a/.ipynb_checkpoints/1-checkpoint.png"):
        picture(tmp_path / ".cache" / "val" / name)
    # the folder itself may lie in a hidden one
    assert len(Places(tmp_path / ".cache", "val")) == 2


def test_hidden_folders_are_no_cities(tmp_path):
    for city in ("ulm", ".ipynb_checkpoints"):
        picture(tmp_path / "leftImg8bit" / "train" / city / "a_leftImg8bit.png")
    (tmp_path / "gtFine" / "train" / "ulm").mkdir(parents=True)
    Image.new("L", (8, 8), 7).save(tmp_path / "gtFine" / "train" / "ulm" / "a_gtFine_labelIds.png")
    assert len(Cityscapes(tmp_path, "train")) == 1


def test_hidden_samples_of_shards_are_passed_over(tmp_path):
    pytest.importorskip("webdataset")
    from carafepp.tasks.shards import Shards

    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "JPEG")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key in ("a/0", "./a/1", "a/.ipynb_checkpoints/0", "__MACOSX/0", "a/._0"):
            for suffix, data in (("jpg", content.getvalue()), ("cls", b"1" if key in ("a/0", "./a/1") else b"broken")):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    shards = Shards(str(tmp_path / "a.tar"))
    shards.batches, shards.batch_size = 2, 3
    assert [labels.tolist() for _, labels in shards] == [[1, 1, 1], [1, 1, 1]]


def test_flat_validation_folder_says_how_to_sort(tmp_path):
    classes = {"ILSVRC2012_val_00000001": "n02119789", "ILSVRC2012_val_00000002": "n02100735", "ILSVRC2012_val_00000003": "n02119789"}
    for name in classes:
        picture(tmp_path / "val" / f"{name}.JPEG")
    with pytest.raises(FileNotFoundError) as error:
        ImageNet(tmp_path, "val", classes=2)
    assert "val holds 3 images and no folder for each class: move each image into the folder of its class" in str(error.value)
    assert SORT in str(error.value)
    # that list is of ImageNet's validation images alone
    (tmp_path / "val").rename(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"move each image into the folder of its class$"):
        ImageNet(tmp_path, "train", classes=2)
    (tmp_path / "train").rename(tmp_path / "val")
    rows = [f"{name},{folder} 12 30 200 180 {folder} 1 2 3 4 " for name, folder in classes.items()]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    subprocess.run(["bash", "-c", SORT], cwd=tmp_path, check=True)
    data = ImageNet(tmp_path, "val", classes=2)
    assert data.class_names == ["n02100735", "n02119789"]
    assert [label for _, label in data.samples] == [0, 1, 1]


def test_images_outside_the_classes_are_counted(tmp_path, caplog):
    picture(tmp_path / "train" / "cat" / "0.png")
    for name in ("b.png", "a.png"):
        picture(tmp_path / "train" / name)
    with caplog.at_level(logging.WARNING):
        assert len(ImageNet(tmp_path, "train", classes=1)) == 1
    assert "2 images outside the folders of the classes are not used, the first is a.png" in caplog.text
