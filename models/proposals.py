"""Proposals trained as in MMDetection 1: anchors that cross the border of their image take no part in training."""

from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork


class BorderedProposals(RegionProposalNetwork):
    """torchvision's region proposal network, in which anchors that reach too far beyond the border of an image are neither matched nor
    sampled in training. Proposals and state-dict keys are torchvision's.

    Args:
        rpn: the network whose parts and settings are taken over.
        allowed_border: pixels by which an anchor may cross a border of its image, padding excluded.
    """

    def __init__(self, rpn: RegionProposalNetwork, allowed_border: float) -> None:
        super().__init__(
            rpn.anchor_generator,
            rpn.head,
            fg_iou_thresh=rpn.proposal_matcher.high_threshold,
            bg_iou_thresh=rpn.proposal_matcher.low_threshold,
            batch_size_per_image=rpn.fg_bg_sampler.batch_size_per_image,
            positive_fraction=rpn.fg_bg_sampler.positive_fraction,
            pre_nms_top_n=rpn._pre_nms_top_n,
            post_nms_top_n=rpn._post_nms_top_n,
            nms_thresh=rpn.nms_thresh,
            score_thresh=rpn.score_thresh,
        )
        self.box_coder = rpn.box_coder
        self.allowed_border = allowed_border
        self.sizes: list[tuple[int, int]] = []

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the proposals [n, 4] of each image and, in training, the losses; see torchvision."""
        self.sizes = images.image_sizes
        return super().forward(images, features, targets)

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the label of each anchor (1 object, 0 background, -1 not used) and the box [n, 4] that it is to become."""
        inside = [self.find_inside(boxes, size) for boxes, size in zip(anchors, self.sizes, strict=True)]
        labels, matched = [], []
        for boxes, used, target in zip(anchors, inside, targets, strict=True):
            label, match = boxes.new_full((len(boxes),), -1.0), boxes.clone()
            if used.any():
                (found,), (becomes,) = super().assign_targets_to_anchors([boxes[used]], [target])
                label[used], match[used] = found, becomes.to(match.dtype)
            labels.append(label)
            matched.append(match)
        return labels, matched

    def find_inside(self, anchors: Tensor, size: tuple[int, int]) -> Tensor:
        """Return which anchors [n, 4] cross no border of an image of `size` by more than the allowed pixels -> bool [n]."""
        height, width = size
        x1, y1, x2, y2 = anchors.unbind(1)
        border = self.allowed_border
        return (x1 >= -border) & (y1 >= -border) & (x2 < width + border) & (y2 < height + border)
