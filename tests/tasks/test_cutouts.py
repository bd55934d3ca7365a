"""Scenes of cut-outs: exact masks from alpha, disjoint splits, deterministic items, and errors that say what to install."""

import numpy as np
import pytest
from carafepp.tasks.cutouts import load_cutouts, paint_cutout, place_cutout
from carafepp.tasks.scenes import Scenes
from configurations import compose_config
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

CLASSES = ("disc", "bar")


def draw_cutout(colour, box):
    """Draw an image of 60 x 60 pixels that is transparent except for an ellipse in `box`."""
    # another colour below the transparent pixels
    image = Image.new("RGBA", (60, 60), (0, 255, 0, 0))
    ImageDraw.Draw(image).ellipse(box, fill=(*colour, 255))
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of six cut-outs in several modes, beside files that are none."""
    root = tmp_path_factory.mktemp("cutouts")
    for index in range(6):
        for name, box in (("disc", (10, 10, 50, 50)), ("bar", (25, 4, 35, 56))):
            path = root / name / ("more" if index % 2 else "") / f"{index}.png"
            image = draw_cutout((255, 40 * index, 0), box)
            # modes of the stamps of Tux Paint
            image = image.convert("LA") if index == 2 else image.quantize(16) if index == 3 else image
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    Image.new("RGB", (60, 60), (0, 0, 255)).save(root / "disc" / "opaque.png")
    Image.new("RGBA", (60, 60), (0, 0, 255, 0)).save(root / "disc" / "empty.png")
    (root / "disc" / "name.txt").write_text("a disc")
    return root


def test_splits_share_no_file_and_leave_out_what_is_no_cutout(folder):
    train, val = (load_cutouts(str(folder), CLASSES, split) for split in ("train", "val"))
    for of_train, of_val, number in zip(train, val, (6, 6), strict=True):
        pixels = {image.tobytes() for image in (*of_train, *of_val)}
        assert len(of_train) + len(of_val) == number == len(pixels)
        assert len(of_train) > len(of_val) > 0
    # cropped to what is not transparent
    assert all(abs(image.width - 41) <= 1 and abs(image.height - 41) <= 1 for image in train[0] + val[0])


def test_a_painted_cutout_changes_what_its_alpha_covers():
    rng = np.random.default_rng(0)
    image = draw_cutout((255, 0, 0), (0, 0, 59, 59))
    for height in (8, 20, 60):
        pixels = place_cutout(rng, image, height, (48, 48))
        assert pixels.shape[0] <= 48
        assert pixels.shape[1] <= 48
        patch = np.full((3, *pixels.shape[:2]), 0.5, np.float32)
        paint_cutout(patch, pixels)
        alpha = pixels[..., 3]
        assert (patch[:, alpha == 0] == 0.5).all()
        opaque = alpha == 1
        assert opaque.any()
        assert (patch[0, opaque] > 0.7).all()
        # the green below the transparent pixels does not bleed into the edge
        assert (patch[1] <= 0.51).all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_scenes_of_cutouts_are_labelled_and_repeatable(folder, split):
    scenes = Scenes(split, 30, 64, seed=1, objects=(1, 3), view="detection", cutouts=str(folder), classes=CLASSES)
    for index in range(30):
        scene, again = scenes.scene((2, index)), scenes.scene((2, index))
        assert np.array_equal(scene.image, again.image)
        assert 0 <= scene.image.min() <= scene.image.max() <= 1
        assert scene.labels[0] == 1 + index % 2
        assert set(scene.labels) <= {1, 2}
        assert np.array_equal(scene.masks.any(0), scene.semantic > 0)
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            assert mask.any()
            assert (scene.semantic[mask] == label).all()
    assert not np.array_equal(scenes.scene((0, 3)).image, scenes.scene((1, 3)).image)


def test_folders_without_cutouts_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scene.cutouts=.* has none for bar.*apt-get install tuxpaint-stamps-default"):
        Scenes("train", 4, 64, cutouts=str(tmp_path), classes=("bar",))
    (tmp_path / "bar").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "bar" / "opaque.png")
    with pytest.raises(ValueError, match="has no image with transparency for the val split of bar"):
        Scenes("val", 4, 64, cutouts=str(tmp_path), classes=("bar",))
    (tmp_path / "bar" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bar/broken.png cannot be read as an image"):
        [Scenes(split, 4, 64, cutouts=str(tmp_path), classes=["bar"]) for split in ("train", "val")]


@pytest.mark.parametrize("task", ["segmentation", "detection", "classification", "inpainting"])
def test_an_option_replaces_the_digits_in_every_task(folder, task):
    own = [f"scene.cutouts={folder}", "scene.classes=[disc,bar]", "scene.semantic=[background,disc,bar]", "scene.number=2"]
    config = compose_config("train", f"task={task}", "scale=small", "scenes=stamps", *own)
    data = OmegaConf.to_container(config.data, resolve=True)
    if task == "inpainting":
        # its scenes have no objects
        assert "cutouts" not in data["train"]["images"]
        return
    assert data["train"]["cutouts"] == data["val"]["cutouts"] == str(folder)
    item = instantiate(data["val"])[1]
    target = item[1]["labels"][0] - 1 if task == "detection" else item[1].max() - 1 if task == "segmentation" else item[1]
    assert target == 1
    names = config.get("class_names")
    assert config.get("num_classes", 2) == 2
    expected = {"segmentation": ["background", "disc", "bar"], "detection": ["disc", "bar"], "classification": None}[task]
    assert names == expected
