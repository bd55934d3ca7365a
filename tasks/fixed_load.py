"""A load that does not depend on a network's weights: fixed truths for training, and fixed proposals and detections of detectors.

Measurements of networks with random weights need it, so that networks differ only by their layers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .classification import Classification
from .detection import Detection
from .inpainting import Inpainting
from .segmentation import Segmentation
from .task import Task

# the parts of a detector that torch.compile and CUDA graphs take; the others, proposals and suppression, have shapes that depend on values
STATIC_PARTS = ("model.backbone", "model.roi_heads.box_head", "model.roi_heads.mask_head", "model.roi_heads.mask_predictor")
# standard deviation of the replaced deltas: boxes stay near their anchors
DELTAS = 0.1
# boxes of objects in training: fractions of the side of the image from which they start, and that they cover. All of these 50 train the box
# head and the mask head, about as many as the boxes with an object of a trained detector
BOX_STARTS = (0.02, 0.16, 0.3, 0.44, 0.58)
BOX_SIDES = (0.1, 0.4)


def fix_load(task: Task) -> None:
    """Fix the values from which a detector computes proposals and detections, so that their number does not depend on its weights.

    The load of other networks does not depend on weights. The heads of a detector compute as always. Then normally distributed numbers
    replace the values of their outputs, the same for every network, and gradients flow as if nothing had been replaced. Proposals, sampled
    boxes and detections are therefore the same for every network with the same anchors and classes.
    """
    if not isinstance(task, Detection):
        return
    for head in (task.model.rpn.head, task.model.roi_heads.box_predictor):
        head.register_forward_hook(replace_values)


@functools.lru_cache(maxsize=64)
def draw_values(shape: torch.Size, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw normally distributed numbers of a standard deviation, the same ones for the same shape."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device, dtype)


def replace_values(module: nn.Module, arguments: Any, outputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """Forward hook of a head with the outputs (scores, deltas of boxes): it replaces their values, and keeps their gradients."""

    def replace(output: Tensor, scale: float) -> Tensor:
        values = draw_values(output.shape, scale, output.dtype, output.device)
        return values + (output - output.detach()) if output.requires_grad else values

    scores, deltas = outputs
    return tree_map(functools.partial(replace, scale=1.0), scores), tree_map(functools.partial(replace, scale=DELTAS), deltas)


def keep_size(task: Task, size: Sequence[int]) -> None:
    """Let a detector take images of a size (height, width) as they are, instead of resizing them to the size of its training."""
    if isinstance(task, Detection):
        task.model.transform.min_size, task.model.transform.max_size = (min(size),), max(size)


def label_images(images: Tensor) -> Tensor:
    """Return the class 0 for images [N, 3, H, W]."""
    return torch.zeros(len(images), dtype=torch.long, device=images.device)


def label_pixels(images: Tensor) -> Tensor:
    """Return the class 0 for every pixel of images [N, 3, H, W]."""
    return torch.zeros_like(images[:, 0], dtype=torch.long)


def make_holes(images: Tensor) -> Tensor:
    """Return masks [N, 1, H, W] of a hole with half the height and width of the images [N, 3, H, W]."""
    height, width = images.shape[2:]
    masks = torch.zeros_like(images[:, :1])
    masks[:, :, height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = 1
    return masks


def place_objects(images: Tensor) -> list[dict[str, Tensor]]:
    """Return the same objects of class 1, small and large, with boxes and masks, for each of the images [N, 3, H, W]."""
    height, width = images.shape[2:]
    fractions = [(x, y, x + side, y + side) for x in BOX_STARTS for y in BOX_STARTS for side in BOX_SIDES]
    boxes = torch.tensor(fractions, device=images.device) * torch.tensor([width, height, width, height], device=images.device)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8, device=images.device)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
    labels = torch.ones(len(boxes), dtype=torch.long, device=images.device)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    target = {"boxes": boxes, "labels": labels, "masks": masks, "area": areas, "iscrowd": torch.zeros_like(labels)}
    return [target for _ in images]


TRUTHS: dict[type[Task], Callable[[Tensor], Any]] = {
    Classification: label_images,
    Segmentation: label_pixels,
    Inpainting: make_holes,
    Detection: place_objects,
}


def make_truth(task: Task, images: Tensor) -> Any:
    """Return the truths with which a task trains on images [N, 3, H, W]."""
    return next(make for kind, make in TRUTHS.items() if isinstance(task, kind))(images)


def list_static_parts(task: Task) -> list[str]:
    """Return the names of the modules of a task whose shapes do not depend on values: the network, or parts of a detector."""
    return [name for name, _ in task.named_modules() if name in STATIC_PARTS] if isinstance(task, Detection) else ["model"]
