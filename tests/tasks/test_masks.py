"""Holes depend on the key alone and have the published shape; mask files are checked."""

import numpy as np
import pytest
import torch
from carafepp.tasks.masks import Box, FreeForm, Masked, MaskFiles, read_mask
from carafepp.tasks.scenes import Scenes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

SIZES = st.tuples(st.integers(1, 80), st.integers(1, 80))


@pytest.mark.parametrize("draw", [FreeForm(), FreeForm(width=(1, 3)), Box(), Box((1, 1))], ids=["strokes", "thin", "box", "whole"])
@given(size=SIZES, seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_hole_has_the_images_size_and_a_pixel(draw, size, seed):
    hole = draw(np.random.default_rng(seed), *size)
    assert hole.shape == size
    assert hole.dtype == bool
    assert hole.any()
    assert np.array_equal(hole, draw(np.random.default_rng(seed), *size))


def test_strokes_are_as_wide_as_asked_and_cover_what_the_published_ones_do():
    holes = [FreeForm()(np.random.default_rng(seed), 256, 256) for seed in range(100)]
    # the widest place of a stroke: twice the largest distance to a known pixel, more where strokes meet
    widths = [2 * ndimage.distance_transform_edt(hole).max() for hole in holes]
    assert min(widths) >= 10
    assert 20 < np.median(widths) < 60
    assert 0.1 < np.mean(holes) < 0.35
    assert max(ndimage.label(hole, np.ones((3, 3)))[1] for hole in holes) == 3
    # strokes are mirrored at random, so that they prefer no side
    assert abs(np.mean(holes, 0)[:128].mean() - np.mean(holes, 0)[128:].mean()) < 0.05


def test_boxes_take_every_side_and_place():
    holes = np.stack([Box((0.25, 0.5))(np.random.default_rng(seed), 32, 40) for seed in range(300)])
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert (heights.min(), heights.max()) == (8, 16)
    assert (widths.min(), widths.max()) == (10, 20)
    assert np.array_equal(holes.sum((1, 2)), heights * widths)
    assert holes[:, 0].any()
    assert holes[:, -1].any()


def test_holes_are_fixed_by_the_key_alone():
    data = Masked(Scenes("val", 4, 32, view="photograph"), FreeForm((3, 8)))
    image, mask = data[2]
    assert (image.shape, mask.shape) == ((3, 32, 32), (1, 32, 32))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    torch.rand(3), np.random.rand(3), data[1]
    assert torch.equal(data[2][1], mask)
    assert torch.equal(data[0, 2][1], mask)
    others = [data[1][1], data[1, 2][1], Masked(data.images, data.masks, seed=1)[2][1]]
    assert not any(torch.equal(other, mask) for other in others)
    # brush strokes draw nothing from the global generators
    state = torch.get_rng_state()
    data[3]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FreeForm(width=(0, 4)), "width must be .* got \\(0, 4\\)"),
        (lambda: FreeForm(strokes=(3, 1)), "strokes must be .* got \\(3, 1\\)"),
        (lambda: FreeForm(turns=(4,)), "turns must be .* got \\(4,\\)"),
        (lambda: Box((0.5,)), "side must be .* got \\(0.5,\\)"),
        (lambda: Box((0.5, 1.5)), "side must be .* got \\(0.5, 1.5\\)"),
    ],
)
def test_ranges_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def hole_file(path, size=(20, 30)):
    pixels = np.zeros(size, np.uint8)
    pixels[5:9, 3:20] = 255
    Image.fromarray(pixels).save(path)
    return pixels > 0


@pytest.mark.parametrize("kind", [bool, np.uint8, np.uint16, np.int32, np.float32])
def test_masks_of_any_type_of_number(tmp_path, kind):
    hole = hole_file(tmp_path / "hole.png")
    Image.fromarray((hole if kind is bool else 255 * hole).astype(kind)).save(tmp_path / "other.tif")
    assert np.array_equal(read_mask(tmp_path / "other.tif"), hole)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_mask_files_of_any_kind_are_read(tmp_path, mode):
    hole = hole_file(tmp_path / "hole.png")
    with Image.open(tmp_path / "hole.png") as image:
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "other.png")
    assert np.array_equal(read_mask(tmp_path / "other.png"), hole)


def test_wrong_mask_files_are_named(tmp_path):
    hole_file(tmp_path / "hole.png")
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "none.png")
    red = np.zeros((8, 8, 3), np.uint8)
    red[2:4, :, 0] = 255
    Image.fromarray(red).save(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("no mask")
    for name, message in (
        ("grey", "grey.png must contain only black .* got 64 values between, such as 128"),
        ("none", "none.png has no hole"),
        ("red", "red.png must contain only black .* got colours"),
        ("text", "mask .*text.png cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            read_mask(tmp_path / f"{name}.png")
    with pytest.raises(FileNotFoundError, match=r"mask .*missing.png does not exist"):
        read_mask(tmp_path / "missing.png")


def test_folder_of_masks_draws_holes_for_images_of_any_size(tmp_path):
    (tmp_path / "masks").mkdir()
    hole = hole_file(tmp_path / "masks" / "hole.png")
    draw = MaskFiles(tmp_path / "masks")
    assert np.array_equal(draw(np.random.default_rng(0), 20, 30), hole)
    twice = draw(np.random.default_rng(0), 40, 60)
    assert np.array_equal(twice, hole.repeat(2, 0).repeat(2, 1))
    with pytest.raises(ValueError, match=r"hole.png has no hole left at 1 x 1 pixels"):
        draw(np.random.default_rng(0), 1, 1)
    with pytest.raises(FileNotFoundError, match=r"mask folder .*nowhere is missing"):
        MaskFiles(tmp_path / "nowhere")


def layer(path, color, hole, background=(0, 0, 0, 0), opacity=255):
    """Save an image of strokes of one colour on a transparent background."""
    pixels = np.empty((*hole.shape, 4), np.uint8)
    pixels[:] = background
    pixels[hole] = (*color, opacity)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def hole():
    made = np.zeros((20, 30), bool)
    made[5:9, 3:20] = True
    return made


@pytest.mark.parametrize("color", [(255, 255, 255), (255, 0, 0), (90, 200, 40)])
@pytest.mark.parametrize("background", [(0, 0, 0, 0), (255, 255, 255, 0), (7, 8, 9, 0)])
def test_strokes_on_a_transparent_layer_are_the_hole(tmp_path, hole, color, background):
    path = layer(tmp_path / "layer.png", color, hole, background)
    assert np.array_equal(read_mask(path), hole)
    assert np.array_equal(read_mask(path, invert=True), ~hole)
    assert np.array_equal(MaskFiles(tmp_path)(np.random.default_rng(0), *hole.shape), hole)


def test_grey_and_indexed_layers(tmp_path, hole):
    grey = np.stack([np.full(hole.shape, 255, np.uint8), np.where(hole, 255, 0).astype(np.uint8)], -1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_mask(tmp_path / "grey.png"), hole)
    indexed = Image.fromarray(hole.astype(np.uint8)).convert("P")
    indexed.putpalette([255, 255, 255] * 256)
    indexed.save(tmp_path / "indexed.png", transparency=0)
    assert np.array_equal(read_mask(tmp_path / "indexed.png"), hole)


def test_transparency_of_two_meanings_is_an_error(tmp_path, hole):
    with pytest.raises(ValueError, match=r"black.png has transparent and black pixels, either may be the hole"):
        read_mask(layer(tmp_path / "black.png", (0, 0, 0), hole, (255, 255, 255, 0)))
    layer(tmp_path / "both.png", (255, 255, 255), hole)
    pixels = np.array(Image.open(tmp_path / "both.png"))
    pixels[0] = (0, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "both.png")
    with pytest.raises(ValueError, match=r"both.png has transparent pixels and strokes of several colours"):
        read_mask(tmp_path / "both.png")
    with pytest.raises(ValueError, match=r"none.png has no hole"):
        read_mask(layer(tmp_path / "none.png", (255, 255, 255), hole & False))
    soft = layer(tmp_path / "soft.png", (255, 255, 255), hole, opacity=200)
    with pytest.raises(ValueError, match=r"soft.png must contain only black .* got 68 values between, such as 200: give a threshold"):
        read_mask(soft)
    assert np.array_equal(read_mask(soft, threshold=128), hole)


def test_inverted_and_soft_masks(tmp_path, hole, caplog):
    Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)).save(tmp_path / "inverted.png")
    assert np.array_equal(read_mask(tmp_path / "inverted.png", invert=True), hole)
    Image.fromarray(np.where(hole, 255, 0).astype(np.uint8)).save(tmp_path / "blurred.jpg", quality=30)
    with pytest.raises(ValueError, match="values between"):
        read_mask(tmp_path / "blurred.jpg")
    assert (read_mask(tmp_path / "blurred.jpg", threshold=128) == hole).mean() > 0.97
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert np.array_equal(read_mask(tmp_path / "ramp.png", threshold=100), ramp >= 100)
    assert np.array_equal(read_mask(tmp_path / "ramp.png", threshold=100, invert=True), ramp < 100)
    for threshold in (0, 256, 128.5, "128"):
        with pytest.raises(ValueError, match=f"threshold must be a whole number in 1..255, got {threshold!r}"):
            read_mask(tmp_path / "ramp.png", threshold=threshold)
    assert "hole" not in caplog.text


def test_nearly_everything_hole_is_a_warning(tmp_path, caplog):
    pixels = np.full((20, 30), 255, np.uint8)
    pixels[0, :5] = 0
    Image.fromarray(pixels).save(tmp_path / "all.png")
    for _ in range(3):
        read_mask(tmp_path / "all.png")
    assert caplog.text.count("99.2 % of the picture is hole; if black is meant to be the hole, invert the mask") == 1
