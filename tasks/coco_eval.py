"""Detections in COCO's results format, and their average precision, computed by pycocotools."""

import contextlib
import io
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from tqdm import tqdm

# Sides in pixels of the squares whose areas separate small from medium, and medium from large objects.
COCO_SIDES = (32, 96)

SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def encode_masks(masks: Tensor) -> list[dict]:
    """Encode masks [n, H, W] in {0, 1} as compressed run lengths for JSON."""
    if len(masks) == 0:
        return []
    lengths: Any = rle.encode(np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8)))
    return [{"size": list(each["size"]), "counts": each["counts"].decode()} for each in lengths]


def to_corner_and_size(boxes: Tensor) -> list[list[float]]:
    """Convert boxes [n, 4] from x1, y1, x2, y2 to x, y, width, height, the form of COCO's files."""
    boxes = boxes.double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    return boxes.tolist()


def format_results(found: dict[str, Tensor], image_id: int, category_ids: Sequence[int]) -> dict[str, list[dict]]:
    """Convert torchvision's detections in one image to entries of COCO's results files: "bbox" and, if there are masks, "segm".

    Boxes and masks need separate files: for entries with both, pycocotools uses the area of the box as that of the mask.
    """
    labels, scores = found["labels"].tolist(), found["scores"].double().tolist()
    heads = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "score": score} for label, score in zip(labels, scores, strict=True)
    ]
    kinds = {"bbox": [{**head, "bbox": box} for head, box in zip(heads, to_corner_and_size(found["boxes"]), strict=True)]}
    if "masks" in found:
        lengths = encode_masks(found["masks"][:, 0] > 0.5)
        kinds["segm"] = [{**head, "segmentation": mask} for head, mask in zip(heads, lengths, strict=True)]
    return kinds


def read_ground_truth(data: Any, class_names: Sequence[str]) -> dict:
    """Return the content of a COCO annotation file for a data set whose items are (image, torchvision's target).

    If the data set has such a file, its method `ground_truth` returns the content. Otherwise all items are read, and labels 1, 2, ...
    become categories 1, 2, ... with the names `class_names`.
    """
    if hasattr(data, "ground_truth"):
        return data.ground_truth()
    images, annotations = [], []
    for index in tqdm(range(len(data)), "ground truth", unit="image", leave=False, disable=None):
        image, target = data[index]
        image_id, (height, width) = int(target["image_id"]), image.shape[-2:]
        images.append({"id": image_id, "height": height, "width": width})
        masks = encode_masks(target["masks"]) if "masks" in target else [None] * len(target["labels"])
        columns = target["labels"].tolist(), to_corner_and_size(target["boxes"]), target["area"].tolist(), target["iscrowd"].tolist(), masks
        for label, box, area, crowd, mask in zip(*columns, strict=True):
            # ids start at 1, because pycocotools counts a match with annotation 0 as no match
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
            annotations.append(entry | ({"segmentation": mask} if mask else {}))
    categories = [{"id": label, "name": name} for label, name in enumerate(class_names, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def evaluate_detections(
    truth: dict,
    found: list[dict],
    kind: str,
    *,
    image_ids: Collection[int] | None = None,
    sides: tuple[float, float] = COCO_SIDES,
) -> Any:
    """Evaluate detections -> pycocotools' COCOeval after its three steps.

    Args:
        truth: the content of an annotation file.
        found: the entries of a results file.
        kind: "bbox" or "segm".
        image_ids: the images to evaluate; None means all images of `truth`.
        sides: sides in pixels of the squares whose areas separate small from medium, and medium from large objects.
    """
    # pycocotools prints its progress
    with contextlib.redirect_stdout(io.StringIO()):
        reference: Any = COCO()
        detections: Any = COCO()
        reference.dataset = truth
        reference.createIndex()
        if found:
            # loadRes modifies the entries
            detections = reference.loadRes([dict(entry) for entry in found])
        evaluation: Any = COCOeval(reference, detections, kind)  # pyright: ignore[reportArgumentType]
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids)
        small, medium = (side**2 for side in sides)
        evaluation.params.areaRng = [[0, 1e10], [0, small], [small, medium], [medium, 1e10]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def read_scores(evaluation: Any) -> dict[str, float]:
    """Return AP, AP50, AP75, APs, APm and APl of `evaluate_detections` as fractions.

    Scores for sizes of which the ground truth has no object (-1 in pycocotools) are omitted.
    """
    return {name: float(score) for name, score in zip(SCORES, evaluation.stats, strict=False) if score > -1}


def class_precision(evaluation: Any) -> dict[int, float | None]:
    """Return the AP of `evaluate_detections` by category id, None for a category without objects."""
    # [thresholds, recalls, categories], for objects of all sizes and the largest number of detections
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    columns = zip(evaluation.params.catIds, np.moveaxis(precision, 2, 0), strict=True)
    return {category: float(values.mean()) if (values > -1).all() else None for category, values in columns}


def average_precision(truth: dict, found: list[dict], kind: str, **options: Any) -> dict[str, float]:
    """Return the scores of detections by name; see `evaluate_detections` and `read_scores`."""
    return read_scores(evaluate_detections(truth, found, kind, **options))
