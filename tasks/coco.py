"""COCO 2017, or any images with annotations in its format."""

import itertools
import logging
import pickle
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .coco_check import UNUSABLE, check, check_images, clipped, decode_mask, read_annotations, refuse_or_count
from .images import read_image
from .keyed import keyed_rng, sample_key

logger = logging.getLogger(__name__)

# Damaged files in a row after which the set is taken to be damaged as a whole.
MOST_DAMAGED = 20


class COCO(Dataset):
    """Images with boxes, labels and masks: item (image [3, H, W] float32 in 0..1, torchvision's target).

    The target holds boxes [n, 4] (x1, y1, x2, y2 in pixels), labels [n] in 1..classes, by the categories' ids, masks [n, H, W] uint8 where
    the file has any, area [n], iscrowd [n] and image_id. It is a training's: crowds and what is not to be trained on (`coco_check.RULES`)
    are left out. Evaluation takes the annotations from `ground_truth`.

    In training, images without an object are left out, and one that cannot be read, or has not the size that the file says, is reported and
    its place taken by the next. For validation all images are decoded beforehand.

    `transforms` maps (tv_tensors.Image uint8, target) to the like, by torchvision.transforms.v2 for instance. Its randomness is a function
    of (seed, epoch, index): `data[index]` is of epoch 0, `data[epoch, index]` of any.

    Args:
        annotations: JSON file.
        images: folder of the files that it names.
        class_names: names of its categories in the order of their ids; numbers, as a command line makes them of digits, are names too.
        train: whether the set is to be trained on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the annotations cannot be used, or have other categories; the message names file, image and rule.

    `groups` says of every image whether it is upright (1) or not (0), for batches of one kind.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        class_names: Sequence[str],
        *,
        train: bool = False,
        transforms: Callable[[Tensor, dict], tuple] | None = None,
        seed: int = 0,
    ):
        content = read_annotations(annotations)
        problems = check(content, images)
        if not train and not any(problem.rule == "image file missing" for problem in problems):
            problems += check_images(content, images)
        refuse_or_count(problems, annotations)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        names = [str(name) for name in class_names]
        if [str(category.get("name")) for category in categories] != names:
            found = ", ".join(f"{category['id']} {category.get('name')}" for category in categories)
            raise ValueError(f"class_names must be the categories of {annotations} by their ids, {found or 'none'}, got {', '.join(names)}")
        self.annotations, self.images = annotations, Path(images)
        self.train, self.transforms, self.seed = train, transforms, seed
        self.unusable = {problem.position for problem in problems if problem.severity == UNUSABLE}
        labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
        self.masks = any(annotation.get("segmentation") for annotation in content["annotations"])
        self._keep(content, labels, {problem.position for problem in problems})

    def _keep(self, content: dict, labels: dict[int, int], left_out: set[int | None]) -> None:
        """Keep what items are made of."""
        objects = defaultdict(list)
        for position, annotation in enumerate(content["annotations"]):
            if position not in left_out and not annotation["iscrowd"]:
                objects[annotation["image_id"]].append(
                    (labels[annotation["category_id"]], annotation["bbox"], annotation["area"], annotation.get("segmentation"))
                )
        kept = [image for image in content["images"] if objects[image["id"]] or not self.train]
        if not kept:
            raise ValueError(f"annotations={self.annotations} has no object to train on")
        if empty := len(content["images"]) - len(kept):
            logger.info("%s: %d images without an object to train on left out", self.annotations, empty)
        self.groups = [int(image["height"] > image["width"]) for image in kept]
        records = [pickle.dumps((image["id"], image["file_name"], image["height"], image["width"], objects[image["id"]])) for image in kept]
        # one array: objects of Python are copied into every worker as their reference counts change
        self.ends = np.cumsum([len(record) for record in records])
        self.records = np.frombuffer(b"".join(records), np.uint8)

    def ground_truth(self) -> dict:
        """The annotation file's content without what is unusable, crowds and what is not trained on included."""
        content = read_annotations(self.annotations)
        content["annotations"] = [a for position, a in enumerate(content["annotations"]) if position not in self.unusable]
        return content

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict]:
        epoch, index = sample_key(key, len(self))
        image, target = self._read(index)
        if self.transforms is not None:
            with keyed_rng(self.seed, epoch, index):
                image, target = self.transforms(image, target)
        plain = {name: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for name, value in target.items()}
        return F.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor), plain

    def _read(self, index: int) -> tuple[tv_tensors.Image, dict]:
        for attempt in itertools.count():
            position = (index + attempt) % len(self)
            image_id, name, height, width, objects = pickle.loads(
                self.records[self.ends[position - 1] if position else 0 : self.ends[position]]
            )
            path = self.images / name
            try:
                image = read_image(path)
                if image.size != (width, height):
                    raise ValueError(f"image {path} is {image.width} x {image.height}, {self.annotations} says {width} x {height}")
                return tv_tensors.Image(image), self._target(image_id, (height, width), objects)
            except (ValueError, FileNotFoundError) as error:
                if not self.train or attempt == MOST_DAMAGED:
                    raise
                logger.warning("%s; the next image takes its place", error)

    def _target(self, image_id: int, size: tuple[int, int], objects: list[tuple]) -> dict:
        boxes = torch.tensor([clipped(box, size) for _, box, _, _ in objects], dtype=torch.float32).reshape(-1, 4)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([label for label, *_ in objects], dtype=torch.int64),
            "area": torch.tensor([area for _, _, area, _ in objects], dtype=torch.float32),
            "iscrowd": torch.zeros(len(objects), dtype=torch.int64),
            "image_id": image_id,
        }
        if self.masks:
            masks = np.stack([np.zeros(size, np.uint8), *(decode_mask(mask, size) for *_, mask in objects)])[1:]
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return target
