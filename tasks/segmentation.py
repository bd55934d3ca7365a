"""Semantic segmentation (paper, sections 4.2 and 5.1; Tables VIII and IX)."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.transforms.v2.functional import normalize

from .boundaries import BoundaryIoU
from .exportable import Exportable, Normalized
from .inference import check_inference, predict_labels
from .label_maps import IGNORED
from .lettering import draw_legend
from .pictures import enlarge, overlay, pick_colors
from .prediction_files import LabelMapFiles
from .task import MakeOptimizer, MakeSchedule, Task, View, check_classes, list_class_names

logger = logging.getLogger(__name__)


def segmentation_scores(confusion: Tensor) -> dict[str, Tensor]:
    """Compute the scores of a whole set from its confusion matrix [classes, classes], whose rows are the truth.

    Returns:
        "IoU" [classes], NaN for a class that is neither in the truth nor in the prediction; "mIoU", the mean over the other classes;
        "pixel_accuracy".
    """
    confusion = confusion.double()
    hits = confusion.diagonal()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    return {"IoU": iou, "mIoU": iou.nanmean(), "pixel_accuracy": hits.sum() / confusion.sum()}


def reduce_labels(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Take labels [N, H, W] at the centres of the cells of a map -> [N, *size]; bilinear interpolation of logits uses the same centres."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].long()


class PadToStride:
    """Collate function: pads images with 0 and labels with 255 to the largest size of the batch, rounded up to a multiple of `stride`."""

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def __call__(self, samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Pad samples of images [3, H, W] and labels [H, W] to one size -> [N, 3, h, w], [N, h, w]; padded labels are ignored."""
        height, width = (-(-max(labels.shape[axis] for _, labels in samples) // self.stride) * self.stride for axis in (0, 1))
        images = samples[0][0].new_zeros(len(samples), 3, height, width)
        padded = samples[0][1].new_full((len(samples), height, width), IGNORED)
        for i, (image, labels) in enumerate(samples):
            h, w = labels.shape
            images[i, :, :h, :w] = image
            padded[i, :h, :w] = labels
        return images, padded


class Segmentation(Task):
    """Task that trains and evaluates a network from images [N, 3, H, W] to logits [N, classes, h, w], with h and w a fraction of H and W.

    The loss is computed at the resolution of the logits, with nearest-neighbour labels, as in UperNet's reference implementation. Scores
    are computed at the resolution of the labels, with logits interpolated bilinearly.

    Args:
        model: the network, as a function of the number of classes.
        class_names: one name for each class. Label 255 is ignored, and pictures do not paint a class "background".
        optimizer, schedule: see `Task`; norms and biases have no weight decay.
        auxiliary_weight: weight of the auxiliary losses; a network with auxiliary classifiers returns (logits, auxiliary, ...) in training.
        inference_resize: resizes images for the prediction; None keeps their size.
        scales, flip, window: see `carafepp.tasks.inference.predict_labels`.
        from_scratch: whether a backbone without pretrained weights is intended; if not, training warns about it.
        mean, std: mean and standard deviation of the images' channels, in [0, 1].

    Raises:
        ValueError: a scale is not above 0, the window is too small, or `class_names` is not a list of names.

    A row of `per_class` holds a class, its IoU (None if the class is neither in the truth nor in the prediction) and its pixels in the
    truth.
    """

    monitor = "val/mIoU"
    direction = "max"
    bench_size = (450, 600)

    def __init__(
        self,
        model: Callable[..., nn.Module],
        *,
        class_names: Sequence[str],
        optimizer: MakeOptimizer,
        schedule: MakeSchedule,
        auxiliary_weight: float = 0.4,
        inference_resize: Callable[[Tensor], Tensor] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: int | None = None,
        from_scratch: bool = False,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        names = list_class_names(class_names, least=2)
        super().__init__(model(num_classes=len(names)), optimizer=optimizer, schedule=schedule)
        self.class_names = names
        if inference_resize is not None and not callable(inference_resize):
            raise TypeError(
                f"inference_resize must be a function of images, such as torchvision's Resize, or null, got {inference_resize!r}"
            )
        self.auxiliary_weight = auxiliary_weight
        check_inference(scales, window)
        self.inference = {"base": inference_resize, "scales": list(scales), "flip": flip, "window": window}
        self.from_scratch = from_scratch
        self.mean, self.std = list(mean), list(std)
        painted = [label for label, name in enumerate(names) if name != "background"]
        self.colors = dict(zip(painted, pick_colors(len(painted)), strict=True))
        self.confusion = MulticlassConfusionMatrix(len(names), ignore_index=IGNORED)
        self.boundaries = BoundaryIoU(len(names))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] in [0, 1] to logits at the network's resolution; in training, auxiliary logits may follow in a tuple."""
        return self.model(normalize(images, self.mean, self.std))

    def setup(self, stage: str) -> None:
        """Check that the network has enough classes for the data.

        Raises:
            ValueError: the data has more classes than the network.
        """
        check_classes(self.trainer, "class_names", len(self.class_names))

    def on_fit_start(self) -> None:
        """Warn about a backbone that starts at random weights, unless this is intended."""
        pretrained = getattr(getattr(self.model, "backbone", None), "pretrained", True)
        if not (pretrained or self.from_scratch) and self.trainer.ckpt_path is None:
            logger.warning(
                "the backbone starts at random weights: give weights_root=FOLDER or backbone.weights=FILE, or task.from_scratch=true"
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of images [N, 3, H, W] in [0, 1] with labels [N, H, W], auxiliary classifiers included."""
        images, labels = batch  # [N, 3, H, W], [N, H, W]
        outputs = self(images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = self._loss(logits, labels) + self.auxiliary_weight * sum(self._loss(others, labels) for others in auxiliary)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = reduce_labels(labels, logits.shape[-2:])
        total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
        # a mean over no pixels would be NaN
        return total / (labels != IGNORED).sum().clamp(min=1)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch, as in training, to the confusion matrix and to the counts of boundaries."""
        images, labels = batch
        predictions = predict_labels(self, images, labels.shape[-2:], **self.inference)
        self.confusion.update(predictions, labels)
        self.boundaries.update(predictions, labels)

    def on_validation_epoch_end(self) -> None:
        """Log the scores over the whole validation set, and keep those of the classes."""
        confusion = self.confusion.compute()
        scores = segmentation_scores(confusion)
        self.confusion.reset()
        boundary = self.boundaries.compute().nanmean()
        self.boundaries.reset()
        columns = zip(self.class_names, scores["IoU"].tolist(), confusion.sum(1).tolist(), strict=True)
        self.per_class = [{"class": name, "IoU": None if math.isnan(iou) else iou, "pixels": pixels} for name, iou, pixels in columns]
        self.log("val/mIoU", scores["mIoU"].float(), prog_bar=True)
        self.log("val/pixel_accuracy", scores["pixel_accuracy"].float())
        self.log("val/boundary_IoU", boundary.float())

    def predict(self, image: Tensor) -> Tensor:
        """Return the labels [H, W] of an image [3, H, W] in [0, 1]."""
        return predict_labels(self, image[None].to(self.device), image.shape[-2:], **self.inference)[0].cpu()

    def draw(self, image: Tensor, prediction: Tensor | None = None) -> Tensor:
        """Draw the prediction over an image [3, H, W] in [0, 1], enlarged by an integer factor if it is small, with a legend below."""
        return self._paint(image, self.predict(image) if prediction is None else prediction)

    def prediction_files(self, folder: Path) -> LabelMapFiles:
        """Return the writer of label maps."""
        return LabelMapFiles(folder, self.class_names)

    def view(self, image: Tensor) -> View:
        """Return the input of the network for an image [3, H, W] in [0, 1]: the whole image, at scale 1."""
        seen = image[None].to(self.device)
        seen = base(seen) if (base := self.inference["base"]) else seen
        return View(self.model, (normalize(seen, self.mean, self.std),), image)

    def exportable(self) -> Exportable:
        """Return the network with its normalisation, from images [N, 3, H, W] in [0, 1] to logits [N, classes, h, w]."""
        logits = (
            "[N, classes, h, w], logits: interpolate them bilinearly (align_corners=False) to the size of the image; the class of a pixel "
        )
        outputs = {"logits": f"{logits}is the argmax over axis 1"}
        network = Normalized(self.model, self.mean, self.std)
        return Exportable(network, {"images": 3}, outputs, network.facts() | {"class_names": self.class_names})

    def pictures(self, sample: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Draw a validation sample -> "image", "truth" and "prediction", [3, height, width] in [0, 1], the last two with a legend below.

        Small images are enlarged.
        """
        image, labels = sample
        return {"image": enlarge(image), "truth": self._paint(image, labels), "prediction": self.draw(image)}

    def _paint(self, image: Tensor, labels: Tensor) -> Tensor:
        """Paint labels [H, W] over an image [3, H, W], both enlarged, with a legend of the labels that occur."""
        colors = {label: self.colors[label] for label in labels.unique().tolist() if label in self.colors}
        pixels = enlarge(image)
        painted = overlay(pixels, enlarge(labels, pixels.shape[1] // image.shape[1]), colors)
        return torch.cat(
            [painted, draw_legend({self.class_names[label]: color for label, color in colors.items()}, pixels.shape[2])], dim=1
        )
