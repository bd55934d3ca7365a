"""Faster R-CNN and Mask R-CNN with sampler slots in backbone, feature pyramid and mask head (paper, section 4.1).

Proposals, RoI heads, losses and the image transform are torchvision's. State-dict keys are also torchvision's, so that its published
weights load into networks with empty slots.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.fx
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .fpn import FPN
from .proposals import BorderedProposals
from .resnet import ResNet
from .samplers import Sampler, make_sampler

FrozenNorm = bool | Literal["statistics"]

# side of the RoI features of the box head
ROI_SIZE = 7


class FixedStatistics(nn.BatchNorm2d):
    """Batch normalisation by its running statistics, also in training, with scale and shift that can be trained."""

    def train(self, mode: bool = True) -> "FixedStatistics":
        """Stay in evaluation mode."""
        return super().train(False)


def freeze_norms(module: nn.Module, *, affine: bool = True) -> None:
    """Replace every batch normalisation in `module`, including those of samplers, by one with fixed statistics.

    Args:
        affine: whether scale and shift are fixed as well.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = (FrozenBatchNorm2d if affine else FixedStatistics)(child.num_features, child.eps).to(child.weight.device)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen.eval())
        else:
            freeze_norms(child, affine=affine)


def freeze_layers(backbone: ResNet, trainable_layers: int) -> None:
    """Train only the last `trainable_layers` of layer1 to layer4; 5 also trains the stem and its sampler.

    Raises:
        ValueError: `trainable_layers` is not in 0..5.
    """
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers must be in 0..5, got {trainable_layers}")
    trained = tuple(f"layer{i}." for i in range(5 - trainable_layers, 5))
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(trainable_layers == 5 or name.startswith(trained))


class BoxCoder(TorchvisionBoxCoder):
    """torchvision's box coder, computed in the dtype of the boxes: with mixed precision, the deltas have a lower precision."""

    def decode(self, rel_codes: Tensor, boxes: list[Tensor]) -> Tensor:
        """Apply deltas rel_codes [n, 4 * classes] to the n boxes of all images together; return boxes [n, classes, 4]."""
        return super().decode(rel_codes.to(boxes[0].dtype), boxes)


# torch.fx cannot follow a condition on the device of a map
@torch.fx.wrap
def _leave_autocast(level: Tensor) -> Tensor:
    """Convert a level of the pyramid to float32 where autocast is enabled."""
    # anchors take the dtype of the features, and between 1024 and 2048 the numbers of bfloat16 are 8 apart
    return level.float() if torch.is_autocast_enabled(level.device.type) else level


class Pyramid(nn.Module):
    """Backbone and feature pyramid, with levels "0" to "3" of strides 4 to 32 and "pool" of stride 64."""

    def __init__(self, body: ResNet, fpn: FPN, out_channels: int):
        super().__init__()
        self.body, self.fpn = body, fpn
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the levels by name, [N, out_channels, ceil(H / stride), ceil(W / stride)], of images x [N, 3, H, W]."""
        levels = self.fpn({str(i): level for i, level in enumerate(self.body(x))})
        return {name: _leave_autocast(level) for name, level in levels.items()}


def _make_pyramid(backbone: ResNet, fpn: Sampler | None, fpn_dim: int, trainable_layers: int, frozen_norm: FrozenNorm) -> Pyramid:
    if frozen_norm not in (True, False, "statistics"):
        raise ValueError(f'frozen_norm must be true, false or "statistics", got {frozen_norm!r}')
    if frozen_norm:
        freeze_norms(backbone, affine=frozen_norm is True)
    freeze_layers(backbone, trainable_layers)
    return Pyramid(backbone, FPN(backbone.out_channels, fpn_dim, upsample=fpn, extra_blocks=LastLevelMaxPool()), fpn_dim)


class FasterRCNN(detection.FasterRCNN):
    """Faster R-CNN (Ren et al., 2015) on a feature pyramid.

    The input is a list of images [3, H, W] in [0, 1] of any sizes. In training, the second input is a list of targets {"boxes" [n, 4] as
    x1, y1, x2, y2 in pixels, "labels" [n]}, and the output is a dict of losses. In evaluation, the output is a list of {"boxes", "labels",
    "scores"} in descending order of the scores. Labels start at 1.

    Args:
        num_classes: number of classes, including the background (0).
        backbone: maps an image to features of strides 4, 8, 16, 32; `out_channels` lists their channels.
        fpn: sampler of the pyramid; None means nearest-neighbour interpolation.
        fpn_dim: channels of the pyramid.
        trainable_layers: number of layers of the backbone, counted from the last, that are trained: 3 freezes the stem and layer1.
        frozen_norm: whether the backbone keeps the batch statistics, scales and shifts of its pretraining; "statistics" keeps only the
            statistics, and trains scales and shifts in the layers that are trained.
        anchor_sizes: side in pixels of the anchors on each of the five levels; height / width is 0.5, 1 and 2.
        head_dim: channels of the box head.
        allowed_border: pixels by which an anchor that trains the proposals may cross the border of its image; None means any number.
        options: further arguments of torchvision's FasterRCNN (`min_size`, `rpn_post_nms_top_n_train`, ...).

    Raises:
        TypeError: an option is not an argument of torchvision's FasterRCNN.
        ValueError: `trainable_layers` is not in 0..5, or `frozen_norm` is none of the above.
    """

    backbone: Pyramid
    rpn: RegionProposalNetwork
    roi_heads: RoIHeads

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: ResNet,
        fpn: Sampler | None = None,
        fpn_dim: int = 256,
        trainable_layers: int = 5,
        frozen_norm: FrozenNorm = False,
        anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
        head_dim: int = 1024,
        allowed_border: float | None = None,
        **options: Any,
    ):
        # torchvision ignores unknown options
        known = {*inspect.signature(detection.FasterRCNN).parameters, *inspect.signature(GeneralizedRCNNTransform).parameters}
        if unknown := sorted(set(options) - known):
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}")
        super().__init__(
            _make_pyramid(backbone, fpn, fpn_dim, trainable_layers, frozen_norm),
            rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in anchor_sizes), ((0.5, 1.0, 2.0),) * len(anchor_sizes)),
            box_head=TwoMLPHead(fpn_dim * ROI_SIZE**2, head_dim),
            box_predictor=FastRCNNPredictor(head_dim, num_classes),
            **options,
        )
        for part in (self.rpn, self.roi_heads):
            part.box_coder = BoxCoder(part.box_coder.weights)
        if allowed_border is not None:
            self.rpn = BorderedProposals(self.rpn, allowed_border)


class MaskRCNN(FasterRCNN):
    """Mask R-CNN (He et al., 2017): Faster R-CNN with a mask of 28 x 28 cells for every detection.

    Targets also hold "masks" [n, H, W] in {0, 1}, and predictions "masks" [n, 1, H, W], probabilities at the size of the image.

    Args:
        num_classes: number of classes, including the background (0).
        mask_head: upsampler of the RoI features, 14 x 14 to 28 x 28. None means the published 2x2 deconvolution of stride 2 with ReLU. A
            sampler has no guide, and no ReLU follows it, as in public code of the paper's detectors.
        mask_dim, mask_convs: channels and number of the 3x3 convolutions before the upsampler.
        options: arguments of `FasterRCNN`.
    """

    def __init__(self, num_classes: int, *, mask_head: Sampler | None = None, mask_dim: int = 256, mask_convs: int = 4, **options: Any):
        super().__init__(num_classes, **options)
        heads = self.roi_heads
        heads.mask_roi_pool = MultiScaleRoIAlign(heads.box_roi_pool.featmap_names, output_size=14, sampling_ratio=2)
        heads.mask_head = MaskRCNNHeads(self.backbone.out_channels, (mask_dim,) * mask_convs, dilation=1)
        heads.mask_predictor = MaskRCNNPredictor(mask_dim, mask_dim, num_classes)
        if mask_head is not None:
            heads.mask_predictor.conv5_mask = make_sampler(mask_head, mask_dim, mask_dim)
            heads.mask_predictor.relu = nn.Identity()
