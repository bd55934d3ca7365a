"""The picture of the scores of classes."""

import pytest
import torch
from carafepp.tasks.class_pictures import BAR, COLORS, draw_scores
from carafepp.tasks.lettering import shorten

ROWS = [
    {"class": "car", "box_AP": 0.5, "mask_AP": 0.25, "objects": 12345},
    {"class": "cat", "box_AP": 1.0, "mask_AP": 0.0, "objects": 7},
    {"class": "brush", "box_AP": None, "mask_AP": None, "objects": 0},
]


def bars(picture, color):
    """Length of each bar of a colour, from top to bottom."""
    lengths = (picture == torch.tensor(color)[:, None, None] / 255).all(0).sum(1).tolist()
    return [a for a, b in zip(lengths, [0, *lengths], strict=False) if a > 0 and b == 0]


def test_bars_are_as_long_as_their_scores():
    picture = draw_scores(ROWS)
    assert picture.shape[0] == 3
    assert (picture.min(), picture.max()) == (0, 1)
    # the first one is the mark in the legend
    assert bars(picture, COLORS[0])[1:] == [BAR // 2 + 1, BAR + 1]
    assert bars(picture, COLORS[1])[1:] == [BAR // 4 + 1]
    assert draw_scores(ROWS * 20).shape[1] > 500


def test_scores_of_a_segmentation_and_of_other_tasks():
    picture = draw_scores([{"class": "road", "IoU": 0.75, "pixels": 10**9}, {"class": "sky", "IoU": None, "pixels": 0}])
    assert bars(picture, COLORS[0])[1:] == [3 * BAR // 4 + 1]
    rows = [{"class": "a", "F1": 0.5, "recall": 0.5, "precision": 0.5, "accuracy": 0.5}, {"class": "b"}]
    assert bars(draw_scores(rows), COLORS[0])[2:] == [BAR // 2 + 1] * 2
    assert draw_scores([{"class": "a", "AP": None, "objects": 0}]).shape[0] == 3


@pytest.mark.parametrize("name", ["two\nlines", "bell\a", "$x^2$ <b>", "名前", "", "x" * 500])
def test_any_name_is_drawn(name):
    picture = draw_scores([{"class": name, "AP": 0.5, "objects": 1}])
    assert picture.shape[2] < 1500
    assert bars(picture, COLORS[0])[1:] == [BAR // 2 + 1]
    assert shorten(name).isprintable()
