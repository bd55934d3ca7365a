"""The detectors with CARAFE that mmdetection publishes: `faster_rcnn_r50_fpn_carafe_1x_coco` and `mask_rcnn_r50_fpn_carafe_1x_coco`.

They differ from the detectors of `carafepp.models.detection` in these points:

- The pyramid has a fifth level, learned from C5, that takes part in the top-down path; there are four CARAFE modules.
- The sizes of images are rounded to the nearest pixel, and their pixels to 8 bits. Images are padded to multiples of 64.
- Anchors are not rounded, and box deltas are also clipped from below.
- RoIAlign samples at pixel centres, with as many samples as a cell has pixels.
- Masks are interpolated between cell centres, without rounding the box first.
- In the files, the background is the last class and has no outputs for boxes and masks.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import Conv2dNormActivation, MultiScaleRoIAlign, box_area, roi_align

from .carafe import CARAFE
from .detection import BoxCoder, FasterRCNN, MaskRCNN
from .fpn import FPN
from .resnet import resnet50
from .weights import Loaded, load_weights, read_state

logger = logging.getLogger(__name__)

Detector = TypeVar("Detector", bound=FasterRCNN)

# for the RGB channels of pixels in 0..255
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

# mmdetection's names of tensors, as patterns, and those of the models here
NAMES = {
    r"backbone\.": "backbone.body.",
    r"neck\.lateral_convs\.(\d)\.conv\.": r"backbone.fpn.inner_blocks.\1.0.",
    r"neck\.fpn_convs\.(\d)\.conv\.": r"backbone.fpn.layer_blocks.\1.0.",
    r"neck\.upsample_modules\.(\d)\.": r"backbone.fpn.upsample.\1.",
    r"rpn_head\.rpn_conv\.": "rpn.head.conv.0.0.",
    r"rpn_head\.rpn_cls\.": "rpn.head.cls_logits.",
    r"rpn_head\.rpn_reg\.": "rpn.head.bbox_pred.",
    r"roi_head\.bbox_head\.shared_fcs\.0\.": "roi_heads.box_head.fc6.",
    r"roi_head\.bbox_head\.shared_fcs\.1\.": "roi_heads.box_head.fc7.",
    r"roi_head\.bbox_head\.fc_cls\.": "roi_heads.box_predictor.cls_score.",
    r"roi_head\.bbox_head\.fc_reg\.": "roi_heads.box_predictor.bbox_pred.",
    r"roi_head\.mask_head\.convs\.(\d)\.conv\.": r"roi_heads.mask_head.\1.0.",
    r"roi_head\.mask_head\.upsample\.": "roi_heads.mask_predictor.conv5_mask.",
    r"roi_head\.mask_head\.conv_logits\.": "roi_heads.mask_predictor.mask_fcn_logits.",
}


class FPNCarafe(FPN):
    """mmdetection's FPN_CARAFE: a 3x3 convolution of stride 2 over C5 makes the level of stride 64, which is upsampled into the others."""

    def __init__(self, in_channels_list: Sequence[int], out_channels: int):
        super().__init__([*in_channels_list, in_channels_list[-1]], out_channels, upsample=partial(CARAFE, up=2))
        self.inner_blocks[-1] = Conv2dNormActivation(
            in_channels_list[-1], out_channels, kernel_size=3, stride=2, norm_layer=None, activation_layer=None
        )

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Build the pyramid, [N, out_channels, H_i, W_i], of levels x by name, finest first; add the level "pool"."""
        return super().forward({**x, "pool": list(x.values())[-1]})


class Transform(GeneralizedRCNNTransform):
    """Image transform: resizes, normalises and pads images [3, H, W] in [0, 1], and scales boxes and masks back to the original sizes.

    Padding is at the bottom and right.
    """

    def __init__(self, min_size: int = 800, max_size: int = 1333):
        super().__init__(min_size, max_size, image_mean=list(MEAN), image_std=list(STD), size_divisible=64)

    def normalize(self, image: Tensor) -> Tensor:
        """Scale an image to 0..255 and round it; the normalisation itself follows in `resize`, where the resized image is rounded again."""
        return (image * 255).round()

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize to the largest size within both limits, at the same aspect ratio up to rounding, and normalise."""
        height, width = image.shape[1:]
        *_, side = cast(tuple[int, ...], self.min_size)
        scale = min(side / min(height, width), self.max_size / max(height, width))
        self.fixed_size = int(width * scale + 0.5), int(height * scale + 0.5)
        image, target = super().resize(image, target)
        return super().normalize(image.round()), target

    def postprocess(
        self, result: list[dict[str, Tensor]], image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Scale boxes [n, 4] and masks [n, 1, h, w] of the results back to the sizes of the images; in training, change nothing."""
        if self.training:
            return result
        masks = [found.pop("masks", None) for found in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, cells, size in zip(result, masks, original_image_sizes, strict=True):
            if cells is not None:
                found["masks"] = paste_masks(cells, found["boxes"], size)
        return result


class Anchors(AnchorGenerator):
    """Anchors whose corners are not rounded."""

    def generate_anchors(
        self,
        scales: Sequence[int],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Compute the corners [ratios * scales, 4] of the anchors around 0; an aspect ratio is height / width."""
        ratios, sides = (torch.as_tensor(values, dtype=dtype, device=device) for values in (aspect_ratios, scales))
        heights = (ratios.sqrt()[:, None] * sides).flatten()
        widths = (sides / ratios.sqrt()[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2


class ClippedBoxCoder(BoxCoder):
    """Box coder that limits not only the growth but also the shrinkage of widths and heights to a factor of 1000 / 16."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Apply deltas rel_codes [n, 4 * classes] to boxes [n, 4]; return boxes [n, 4 * classes]."""
        least = [-math.inf, -math.inf, *(-self.bbox_xform_clip * weight for weight in self.weights[2:])]
        deltas = rel_codes.unflatten(1, (-1, 4)).maximum(rel_codes.new_tensor(least))
        return super().decode_single(deltas.flatten(1), boxes)


class RoIAlign(MultiScaleRoIAlign):
    """RoIAlign between pixel centres; a box of side s is read from the level of stride 4 * 2**i with i = floor(log2(s / 56)) in 0..3."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool the features of boxes.

        Args:
            x: levels [N, C, H_i, W_i] by name.
            boxes: [n, 4] in pixels for each image.
            image_shapes: not used.

        Returns:
            [sum of n, C, *output_size].
        """
        levels = [x[name] for name in self.featmap_names]
        corners = torch.cat(boxes)
        images = torch.cat([torch.full_like(each[:, :1], i) for i, each in enumerate(boxes)])
        chosen = (box_area(corners).sqrt() / 56 + 1e-6).log2().floor().clamp(0, len(levels) - 1)
        pooled = levels[0].new_zeros(len(corners), levels[0].shape[1], *self.output_size)
        for i, level in enumerate(levels):
            here = torch.where(chosen == i)[0]
            rois = torch.cat([images[here], corners[here]], dim=1)
            pooled[here] = roi_align(level, rois, self.output_size, 1 / (4 * 2**i), self.sampling_ratio, aligned=True)
        return pooled


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks [n, 1, h, w] into boxes [n, 4] of empty maps [n, 1, *size], bilinearly between the centres of cells."""

    def weigh_cells(low: Tensor, high: Tensor, length: int, cells: int) -> Tensor:
        """Compute the weight of every cell for every pixel of a line, [n, length, cells]."""
        centres = torch.arange(length, device=masks.device) + 0.5
        positions = (centres - low[:, None]) / (high - low)[:, None] * cells - 0.5
        return (1 - (positions[..., None] - torch.arange(cells, device=masks.device)).abs()).clamp(min=0)

    left, top, right, bottom = boxes.unbind(1)
    rows, columns = weigh_cells(top, bottom, size[0], masks.shape[2]), weigh_cells(left, right, size[1], masks.shape[3])
    return (rows @ masks[:, 0].float() @ columns.mT)[:, None]


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of mmdetection to those of the models here and put the background first; unknown tensors keep their names."""

    def convert_name(name: str) -> str:
        for pattern, replacement in NAMES.items():
            if re.match(pattern, name):
                return re.sub(pattern, replacement, name, count=1)
        return name

    converted = {convert_name(name): value for name, value in state.items()}
    for end in ("weight", "bias"):
        if (name := f"roi_heads.box_predictor.cls_score.{end}") in converted:
            converted[name] = converted[name].roll(1, 0)
        # the background has no boxes and no masks
        for head, rows in (("box_predictor.bbox_pred", 4), ("mask_predictor.mask_fcn_logits", 1)):
            if (name := f"roi_heads.{head}.{end}") in converted:
                value = converted[name]
                converted[name] = torch.cat([value.new_zeros(rows, *value.shape[1:]), value])
    return converted


def load(model: FasterRCNN, path: str | Path) -> Loaded:
    """Copy a checkpoint of mmdetection into one of the models here.

    The batch counts of the norms are not used, because the norms are frozen. The log and the result list all unused tensors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, or does not fit the network.
    """
    state = convert(read_state(path))
    counts = [name for name in state if name.endswith("num_batches_tracked")]
    report = load_weights(model, {name: value for name, value in state.items() if name not in counts})
    if counts:
        logger.info("not used: num_batches_tracked of %d norms, which are frozen", len(counts))
    if report.initialised:
        some = ", ".join(report.initialised[:3])
        raise ValueError(f"weights={path} belongs to another network: it lacks {len(report.initialised)} tensors, {some}, ...")
    return report._replace(unused=report.unused + counts)


def _match_mmdet(model: Detector, weights: str | Path | None) -> Detector:
    """Replace the parts that differ in mmdetection, and load the weights."""
    levels = ["0", "1", "2", "3"]
    model.transform = Transform()
    model.backbone.fpn = FPNCarafe(model.backbone.body.out_channels, model.backbone.out_channels)
    model.rpn.anchor_generator = Anchors(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    model.rpn.box_coder = ClippedBoxCoder((1.0, 1.0, 1.0, 1.0))
    model.roi_heads.box_coder = ClippedBoxCoder((10.0, 10.0, 5.0, 5.0))
    model.roi_heads.box_roi_pool = RoIAlign(levels, output_size=7, sampling_ratio=0)
    if model.roi_heads.has_mask():
        model.roi_heads.mask_roi_pool = RoIAlign(levels, output_size=14, sampling_ratio=0)
    if weights is not None:
        load(model, weights)
    return model


def faster_rcnn_carafe(num_classes: int = 81, *, weights: str | Path | None = None) -> FasterRCNN:
    """Build Faster R-CNN ResNet-50 with CARAFE in the pyramid.

    Labels 1 to 80 are COCO's categories in the order of their ids. Images and results are as in `FasterRCNN`.

    Args:
        num_classes: number of classes, including the background.
        weights: a file `faster_rcnn_r50_fpn_carafe_1x_coco_*.pth` (38.6 AP).

    Raises:
        FileNotFoundError, ValueError: see `load`.
    """
    return _match_mmdet(FasterRCNN(num_classes, backbone=resnet50(), trainable_layers=3, frozen_norm=True), weights)


def mask_rcnn_carafe(num_classes: int = 81, *, weights: str | Path | None = None) -> MaskRCNN:
    """Build Mask R-CNN ResNet-50 with CARAFE in the pyramid and in the mask head.

    `weights` is a file `mask_rcnn_r50_fpn_carafe_1x_coco_*.pth` (39.3 box AP, 35.8 mask AP). See `faster_rcnn_carafe` for labels, images,
    results and errors.
    """
    model = MaskRCNN(num_classes, backbone=resnet50(), trainable_layers=3, frozen_norm=True, mask_head=partial(CARAFE, up=2))
    return _match_mmdet(model, weights)
