"""Sheets of pictures: titles above and beside them, legends and notes below, all inside the sheet and on as many lines as they need."""

import pytest
import torch
from carafepp.scripts.running.predict import name_networks
from carafepp.tasks.lettering import LETTERS, load_font, make_swatch, shorten, wrap
from carafepp.tasks.pictures import COLORS, find_outlines, pick_colors
from carafepp.tasks.sheets import TILE, arrange

GREY = torch.full((3, 64, 64), 0.5)
LONG = "upsampler=carafe, downsampler=carafe, model.a_very_long_name_of_an_option_without_a_space=1"


def is_ink(sheet: torch.Tensor) -> torch.Tensor:
    return (sheet < 0.3).all(0)


def test_small_pictures_are_enlarged_to_one_size():
    sheet = arrange([[GREY, torch.zeros(3, 320, 320)], [GREY[:, :32], GREY]])
    grey = (sheet - 0.5).abs().amax(0) < 0.01
    # 64 x 64 and 32 x 64 pixels, enlarged fivefold
    assert grey.sum() == (2 * 320 + 160) * 320
    assert is_ink(sheet).sum() == 320 * 320


@pytest.mark.parametrize("title", ["image", LONG, "x" * 500, "two\nlines", "bell\a 名前 $x^2$"])
def test_titles_are_whole_and_above_their_column(title):
    plain, sheet = arrange([[GREY, GREY]]), arrange([[GREY, GREY]], columns=["", title])
    assert sheet.shape[2] == plain.shape[2]
    head = is_ink(sheet[:, : sheet.shape[1] - 330])
    assert head.any()
    assert not head[:, : sheet.shape[2] // 2].any()
    # nothing is cut off at an edge
    assert not head[0].any()
    assert not head[:, -1].any()


def test_letters_are_readable_at_half_size():
    for side in (64, 1200):
        head = is_ink(arrange([[torch.ones(3, side, side)]], columns=["H"]))
        # a capital of 7 pixels is readable, and in a large picture it must not be smaller in proportion
        assert head.any(1).sum() >= 2 * 7 * max(1, side / 500)


def test_rows_have_titles_and_the_sheet_a_legend():
    marks = {f"class {i}": make_swatch(color, 20) for i, color in enumerate(COLORS)}
    sheet = arrange([[GREY], [GREY]], titles=["first", "second"], legend=marks, note=LONG)
    for color in COLORS:
        found = (sheet - torch.tensor(color)[:, None, None] / 255).abs().amax(0) < 1e-3
        assert found.sum() == 18 * 18
    left = is_ink(sheet[:, : 2 * TILE, :40])
    assert left[: TILE + 10].any()
    assert left[TILE + 10 :].any()


@pytest.mark.parametrize("text", [LONG, "x" * 150, "a b c", "", "名前 " * 20])
def test_lines_fit_and_nothing_is_lost(text):
    font = load_font(LETTERS)
    lines = wrap(text, font, 200)
    assert all(font.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_long_names_are_shortened():
    assert shorten("x" * 300).endswith("x...")
    assert len(shorten("x" * 300)) == 200
    assert shorten("a\nb") == "a b"


def test_first_colours_can_be_told_apart_with_any_colour_vision():
    # from linear RGB to what eyes without L or M cones see (Machado et al., 2009, severity 1)
    protanopia = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    deuteranopia = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    colors = torch.tensor(pick_colors(10)) / 255
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    for matrix in (torch.eye(3), torch.tensor(protanopia), torch.tensor(deuteranopia)):
        seen = (linear @ matrix.T).clamp(0, 1)
        luminance = seen @ torch.tensor([0.2126, 0.7152, 0.0722])
        distance = torch.cdist(seen ** (1 / 2.2), seen ** (1 / 2.2)) + (luminance[:, None] - luminance).abs()
        assert distance[~torch.eye(10, dtype=torch.bool)].min() > 0.1
    # more colours begin with the same ones
    assert pick_colors(30)[:10] == pick_colors(10)
    assert len(set(pick_colors(150))) > 140


def test_outlines_are_between_regions_and_not_at_the_edge_of_the_picture():
    labels = torch.zeros(1, 20, 20)
    labels[0, :, :10] = 3
    (outlines,) = find_outlines(labels)
    assert outlines.any(0).nonzero().flatten().tolist() == [9, 10]


def test_networks_are_named_by_what_distinguishes_them():
    common = ["experiment=table7", "scale=small", "seed=3", "data.epochs=4"]
    rows = [["row=table7/published", *common], ["row=table7/fpn", *common]]
    assert name_networks(rows, ["a/best.ckpt", "b/best.ckpt"]) == ["published", "fpn"]
    assert name_networks(rows[:1], ["a/best.ckpt"]) == ["published, data.epochs=4"]
    assert name_networks([["samplers=carafe"], []], ["a/best.ckpt", "b/best.ckpt"]) == ["samplers=carafe", "b"]
    # runs that differ in their seed alone
    assert name_networks([common, common], ["x/a/best.ckpt", "y/a/best.ckpt"]) == ["a", "a, y/a/best.ckpt"]
