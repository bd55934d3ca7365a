"""Boundary IoU of label maps: the agreement of regions along their contours (Cheng et al., 2021, section 4)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from .label_maps import IGNORED

# Width of a boundary as a share of the diagonal of the image: that of Cheng et al. for COCO, Cityscapes and ADE20K.
WIDTH = 0.02


def mark_boundaries(labels: Tensor) -> Tensor:
    """Mark the pixels of label maps [N, H, W] that are near the contour of their own region -> [N, H, W] bool.

    A pixel is near if a pixel of another label, or outside the image, is at most `WIDTH` of the diagonal away, but at least one pixel,
    horizontally and vertically. This is the region minus its erosion, as in the authors' implementation.
    """
    width = max(1, round(WIDTH * math.hypot(*labels.shape[-2:])))
    maps = labels.float()[:, None]
    # no label is -1, so that the edge of the image is a contour
    around = F.pad(maps, [width] * 4, value=-1)
    side = 2 * width + 1
    most, least = (sign * F.max_pool2d(F.max_pool2d(sign * around, (side, 1), 1), (1, side), 1) for sign in (1, -1))
    return ((most != maps) | (least != maps))[:, 0]


class BoundaryIoU(Metric):
    """IoU of the boundaries of each class over a whole set.

    The boundary of a class is the part of its pixels that `mark_boundaries` marks. Pixels of label 255 in the truth are ignored.

    Args:
        classes: number of classes.
    """

    full_state_update = False
    hits: Tensor
    union: Tensor

    def __init__(self, classes: int, **options: Any) -> None:
        super().__init__(**options)
        self.classes = classes
        for name in ("hits", "union"):
            self.add_state(name, torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add predictions and labels, [N, H, W]."""
        predictions = torch.where(labels == IGNORED, IGNORED, predictions)
        found, true = mark_boundaries(predictions) & (predictions != IGNORED), mark_boundaries(labels) & (labels != IGNORED)
        hits = self._count(labels[found & true & (predictions == labels)])
        self.hits += hits
        self.union += self._count(predictions[found]) + self._count(labels[true]) - hits

    def _count(self, labels: Tensor) -> Tensor:
        return torch.bincount(labels, minlength=self.classes)

    def compute(self) -> Tensor:
        """Compute the boundary IoU [classes]; it is NaN for a class that is neither in the labels nor in the predictions."""
        return self.hits.double() / self.union
