"""Object detection and instance segmentation (paper, sections 4.1 and 5.1; Tables I, III to VII, XI, XIII and XIV)."""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .coco_eval import COCO_SIDES, class_precision, evaluate_detections, format_results, read_ground_truth, read_scores
from .data import get_data
from .exportable import Exportable, Normalized
from .image_files import to_plain
from .pictures import draw_instances, enlarge, pick_colors, write_note
from .prediction_files import DetectionFile
from .task import MakeOptimizer, MakeSchedule, Task, View, check_classes, list_class_names
from .writing import write_atomically

logger = logging.getLogger(__name__)

Target = dict[str, Tensor]

# The kinds of COCO's evaluation, and the prefixes of their scores.
KINDS = {"bbox": "box", "segm": "mask"}

# Pictures show detections with at least this score.
DRAWN_SCORE = 0.5


def collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Merge samples of several sizes into a list of images [3, H, W] and a list of targets of plain tensors."""
    images, targets = zip(*samples, strict=True)
    return list(images), [to_plain(target) for target in targets]


def without_masks(target: Target) -> Target:
    """Return a target without masks, which a network would resize even where it does not use them."""
    return {name: value for name, value in target.items() if name != "masks"}


def with_masks(target: Target) -> Target:
    """Return the objects of a target whose masks have pixels: an empty one would teach a mask head that the object is background."""
    seen = target["masks"].bool().flatten(1).any(1)
    of_objects = {"boxes", "labels", "masks", "area", "iscrowd"}
    return target if seen.all() else {name: value[seen] if name in of_objects else value for name, value in target.items()}


class Detection(Task):
    """Task that trains and evaluates a detector with torchvision's interface (`carafepp.models.detection`), which also normalises images.

    Scores are the AP, AP50, AP75, APs, APm and APl of pycocotools as fractions, with the prefix `box_` and, if the network predicts masks,
    `mask_`. Every validation writes its detections in COCO's results format to detections_bbox.json and detections_segm.json in the
    trainer's folder. On a set without annotations, such as COCO's test-dev, it writes these files and computes no scores.

    Args:
        model: the network, as a function of the number of classes including the background.
        class_names: the names of labels 1, 2, ...
        optimizer, schedule: see `Task`; norms and biases have no weight decay, unless `decay_all`.
        decay_all: whether all parameters have weight decay.
        sides: sides in pixels of the squares whose areas separate small from medium, and medium from large objects.
        flops_size: see `Task`.

    Raises:
        ValueError: `class_names` is not a list of names.

    A row of `per_class` holds a class, its box AP and, if the network predicts masks, its mask AP, and the number of its objects, crowds
    aside. The AP of a class without an object is None.
    """

    monitor = "val/box_AP"
    direction = "max"
    bench_size = (800, 1333)
    # the parts of torchvision's detectors have no type hints
    model: Any

    def __init__(
        self,
        model: Callable[..., nn.Module],
        *,
        class_names: Sequence[str],
        optimizer: MakeOptimizer,
        schedule: MakeSchedule,
        sides: tuple[float, float] = COCO_SIDES,
        flops_size: tuple[int, int] | None = None,
        decay_all: bool = False,
    ) -> None:
        names = list_class_names(class_names)
        super().__init__(model(num_classes=len(names) + 1), optimizer=optimizer, schedule=schedule)
        self.class_names = names
        self.sides, self.flops_size = sides, flops_size
        self.decay_all = decay_all
        self.truth: dict = {}
        self.image_ids: list[int] = []
        self.found: dict[str, list[dict]] = {}

    @property
    def has_masks(self) -> bool:
        """Return whether the network predicts masks."""
        return self.model.roi_heads.has_mask()

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> dict[str, Tensor] | list[Target]:
        """Map images [3, H, W] in [0, 1] to the output of torchvision's detectors: losses in training, else boxes, labels, scores,
        masks."""
        return self.model(list(images), targets)

    def parameter_groups(self) -> list[dict]:
        """Return the parameter groups of the optimizer: matrices with weight decay, vectors without, or all with."""
        if not self.decay_all:
            return super().parameter_groups()
        return [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}]

    @contextlib.contextmanager
    def full_load(self) -> Iterator[None]:
        """Keep the largest possible number of proposals and detections, so that FLOPs do not depend on the image or on the weights."""
        rpn, heads = self.model.rpn, self.model.roi_heads
        before = rpn.nms_thresh, rpn.score_thresh, heads.nms_thresh, heads.score_thresh
        rpn.nms_thresh, rpn.score_thresh, heads.nms_thresh, heads.score_thresh = 1.0, 0.0, 1.0, -1.0
        try:
            yield
        finally:
            rpn.nms_thresh, rpn.score_thresh, heads.nms_thresh, heads.score_thresh = before

    def on_fit_start(self) -> None:
        """Warn about layers that are frozen although their weights are random."""
        body = self.model.backbone.body
        if self.trainer.ckpt_path is not None:
            return
        trained = {name for name, parameter in body.named_parameters() if parameter.requires_grad}
        tensors = {name for name, _ in body.named_parameters()}
        if frozen := [name for name in body.untrained if name in tensors - trained]:
            layers = ", ".join(dict.fromkeys(name.partition(".")[0] for name in frozen))
            logger.warning(
                "layers of the backbone stay frozen at random weights (%s): give weights_root=FOLDER or backbone.weights=FILE of a "
                "classifier with the same samplers, or model.trainable_layers=5",
                layers,
            )

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        """Return the sum of the detector's losses for images [3, H, W] of any sizes and their targets."""
        images, targets = batch
        losses = self(images, [with_masks(target) if self.has_masks else without_masks(target) for target in targets])
        loss = reduce(torch.add, losses.values())
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in losses.items()})
        return loss

    def setup(self, stage: str) -> None:
        """Read the ground truth, and check that the data suffices for training and validation.

        Raises:
            ValueError: the data has more classes than the network, the validation set of a training has no objects, or the network predicts
                masks and the annotations have none.
        """
        check_classes(self.trainer, "class_names", len(self.class_names))
        data, fits = get_data(self.trainer), stage == "fit"
        self.truth = read_ground_truth(data.val, self.class_names)
        objects = any(not annotation["iscrowd"] for annotation in self.truth["annotations"])
        if fits and not objects:
            raise ValueError("the validation set has no objects, so that detections cannot be scored")
        used = [each for each, is_used in ((data.train, fits), (data.val, objects)) if is_used]
        if self.has_masks and not all(getattr(each, "masks", True) for each in used):
            raise ValueError("the network predicts masks, and the annotations have none: model=faster_rcnn needs boxes only")

    def on_validation_epoch_start(self) -> None:
        """Clear the collected detections."""
        self.category_ids = sorted(category["id"] for category in self.truth["categories"])
        self.image_ids, self.found = [], {kind: [] for kind in KINDS if kind == "bbox" or self.has_masks}

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        """Collect the detections in a batch, in COCO's results format."""
        images, targets = batch
        for found, target in zip(self(images), targets, strict=True):
            self.image_ids.append(int(target["image_id"]))
            for kind, entries in format_results(found, self.image_ids[-1], self.category_ids).items():
                self.found[kind] += entries

    def on_validation_epoch_end(self) -> None:
        """Evaluate the detections of all processes and log the average precisions."""
        image_ids = _gather(self.image_ids)
        found = {kind: _gather(entries) for kind, entries in self.found.items()}
        # one process evaluates, because the others would need as much memory and time for the same scores
        evaluated: list[Any] = list(self._evaluate(image_ids, found)) if self.trainer.is_global_zero else [None, None]
        if dist.is_initialized():
            dist.broadcast_object_list(evaluated)
        self.image_ids, self.found = [], {}
        scores, self.per_class = evaluated
        for name, score in scores.items():
            self.log(f"val/{name}", score, prog_bar=name.endswith("AP"))

    def _evaluate(self, image_ids: list[int], found: dict[str, list[dict]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Write the detections and return the scores by name, and those of the classes."""
        for kind, entries in found.items():
            write_atomically(Path(self.trainer.default_root_dir) / f"detections_{kind}.json", json.dumps(entries))
        if not self.truth["annotations"]:
            return {}, []
        evaluations = {
            KINDS[kind]: evaluate_detections(self.truth, entries, kind, image_ids=image_ids, sides=self.sides)
            for kind, entries in found.items()
        }
        scores = {f"{kind}_{name}": score for kind, each in evaluations.items() for name, score in read_scores(each).items()}
        by_class = {f"{kind}_AP": class_precision(each) for kind, each in evaluations.items()}
        seen = set(image_ids)
        objects = Counter(a["category_id"] for a in self.truth["annotations"] if not a["iscrowd"] and a["image_id"] in seen)
        rows = [
            {"class": name, **{kind: precision[category] for kind, precision in by_class.items()}, "objects": objects[category]}
            for name, category in zip(self.class_names, self.category_ids, strict=True)
        ]
        return scores, rows

    def pictures(self, sample: tuple[Tensor, Target]) -> dict[str, Tensor]:
        """Draw a validation sample -> "image", "truth" and "prediction", [3, height, width] in [0, 1]; small images are enlarged."""
        image, target = sample
        truth = target if self.has_masks else without_masks(target)
        return {"image": enlarge(image), "truth": self._overlay(image, truth), "prediction": self.draw(image)}

    def predict(self, image: Tensor) -> Target:
        """Return the detections in an image [3, H, W] in [0, 1]: boxes, labels, scores, masks, and "image_size", its height and width."""
        found = self([image.to(self.device)])[0]
        return {name: value.cpu() for name, value in found.items()} | {"image_size": torch.tensor(image.shape[1:])}

    def draw(self, image: Tensor, prediction: Target | None = None) -> Tensor:
        """Draw the prediction over an image [3, H, W] in [0, 1] -> [3, height, width]; a small image is enlarged by an integer factor.

        Detections whose score is at least DRAWN_SCORE are drawn, each in the colour of its class. If there is none, a note gives the best
        score.
        """
        found = self.predict(image) if prediction is None else prediction
        scores = found["scores"]
        kept = scores >= DRAWN_SCORE
        if not kept.any():
            best = f", best {scores.max():.2f}" if len(scores) else ""
            return write_note(enlarge(image), f"no score >= {DRAWN_SCORE}{best}")
        found = {name: value[kept] for name, value in found.items() if name != "image_size"}
        if "masks" in found:
            found["masks"] = found["masks"][:, 0] > 0.5
        return self._overlay(image, found)

    def prediction_files(self, folder: Path) -> DetectionFile:
        """Return the writer of detections in COCO's format."""
        return DetectionFile(folder, self.class_names)

    def view(self, image: Tensor) -> View:
        """Return the input of backbone and feature pyramid for an image [3, H, W] in [0, 1]."""
        images, _ = self.model.transform([image.to(self.device)])
        height, width = images.tensors.shape[2:]
        (seen_height, seen_width), *_ = images.image_sizes
        return View(self.model.backbone, (images.tensors,), image, (seen_height / height, seen_width / width))

    def exportable(self) -> Exportable:
        """Return backbone and feature pyramid with the normalisation, from images [N, 3, H, W] in [0, 1] to the levels of the pyramid.

        Proposals and heads are left out: how many boxes they pass on depends on the values of a map.
        """
        transform = self.model.transform
        # mmdetection's networks have the mean and standard deviation of values up to 255
        scale = 255 if max(transform.image_mean) > 1 else 1
        mean, std = ([value / scale for value in values] for values in (transform.image_mean, transform.image_std))
        level = (
            "[N, C, h, w], features of the pyramid; the proposals, the heads and the suppression of overlapping boxes are not in the file"
        )
        # the names of the levels in the literature, by their strides of 4 to 64
        outputs = {f"p{i}": level for i in range(2, 7)}
        network = Normalized(self.model.backbone, mean, std)
        facts = {"class_names": self.class_names, "part": "backbone and feature pyramid"}
        return Exportable(network, {"images": 3}, outputs, network.facts() | facts)

    def _overlay(self, image: Tensor, instances: Target) -> Tensor:
        """Draw boxes [n, 4], class names, scores and masks [n, H, W] over an enlarged image, in the colours of the classes."""
        pixels = enlarge(image)
        factor = pixels.shape[1] // image.shape[1]
        labels = instances["labels"].tolist()
        names = [self.class_names[label - 1] for label in labels]
        if "scores" in instances:
            names = [f"{name}: {score:.2f}" for name, score in zip(names, instances["scores"].tolist(), strict=True)]
        colors = pick_colors(len(self.class_names))
        masks = enlarge(instances["masks"].bool(), factor) if "masks" in instances else None
        return draw_instances(pixels, instances["boxes"] * factor, names, [colors[label - 1] for label in labels], masks)


def _gather(entries: list) -> list:
    """Return the entries of all processes in the process that evaluates, and none in the others."""
    if not dist.is_initialized():
        return entries
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(entries, parts)
    return [entry for part in parts or [] for entry in part]
