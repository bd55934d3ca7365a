"""Boundary IoU of label maps."""

import math

import pytest
import torch
from carafepp.tasks.boundaries import BoundaryIoU, mark_boundaries
from carafepp.tasks.label_maps import IGNORED


def find_boundary(mask, width):
    """Return the pixels of a mask [H, W] that repeated erosion by 3 x 3 pixels removes; outside the image, nothing belongs to the mask."""
    height, columns = mask.shape
    eroded = mask.clone()
    for _ in range(width):
        before = eroded.clone()
        for y in range(height):
            for x in range(columns):
                inside = 0 < y < height - 1 and 0 < x < columns - 1
                eroded[y, x] = inside and bool(before[y - 1 : y + 2, x - 1 : x + 2].all())
    return mask & ~eroded


def compute_by_definition(predictions, labels, classes, width):
    scores = []
    for label in range(classes):
        hits = union = 0
        for prediction, truth in zip(predictions, labels, strict=True):
            found = find_boundary((prediction == label) & (truth != IGNORED), width)
            true = find_boundary(truth == label, width)
            hits += int((found & true).sum())
            union += int((found | true).sum())
        scores.append(hits / union if union else math.nan)
    return scores


def make_maps(size, classes, seed, ignored):
    """Make coarse random label maps [2, *size], with a share of ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(classes, (2, *size), generator=generator).repeat_interleave(5, 1)[:, : size[0]].repeat_interleave(5, 2)
    maps = maps[:, :, : size[1]]
    return torch.where(torch.rand(maps.shape, generator=generator) < ignored, IGNORED, maps)


@pytest.mark.parametrize(("size", "width"), [((9, 14), 1), ((60, 44), 1), ((70, 71), 2), ((2, 5), 1)])
@pytest.mark.parametrize("ignored", [0.0, 0.05])
def test_scores_are_those_of_the_definition(size, width, ignored):
    labels, predictions = make_maps(size, 3, 1, ignored), make_maps(size, 3, 2, 0.0)
    # half of the image is right; no pixel has the fourth class
    predictions[:, size[0] // 2 :] = labels[:, size[0] // 2 :].clamp(max=2)
    metric = BoundaryIoU(4)
    for prediction, truth in zip(predictions, labels, strict=True):
        metric.update(prediction[None], truth[None])
    expected = compute_by_definition(predictions, labels, 4, width)
    torch.testing.assert_close(metric.compute(), torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    assert math.isnan(expected[3])


def test_a_shifted_square_loses_more_of_its_boundary_than_of_its_area():
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    labels[0, 20:40, 20:40] = 1
    metric = BoundaryIoU(2)
    metric.update(labels.roll(2, dims=2), labels)
    # the boundary is 2 of the 64 pixels wide: 400 - 256 pixels, of which two strips of 16 x 2 and the corners of the columns remain
    assert int(mark_boundaries(labels)[labels == 1].sum()) == 400 - 16 * 16
    square = find_boundary(labels[0] == 1, 2)
    expected = (square & square.roll(2, dims=1)).sum() / (square | square.roll(2, dims=1)).sum()
    assert metric.compute()[1] == pytest.approx(float(expected))
    assert metric.compute()[1] < 360 / 440
    metric.reset()
    metric.update(labels, labels)
    assert metric.compute().tolist() == [1, 1]
