"""COCO 2017, or any images with annotations in its format."""

import logging
import pickle
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from .coco_check import (
    REPAIRED,
    UNMASKED,
    UNTRAINED,
    UNUSABLE,
    check_annotations,
    check_images,
    clip_box,
    read_annotations,
    refuse_or_count,
)
from .coco_masks import decode_mask, read_mask
from .image_files import ImageFiles
from .images import ReadOptions, read_image, suggest_orientation
from .splits import take_share

logger = logging.getLogger(__name__)


class COCO(ImageFiles):
    """Images with boxes, labels and masks: item (image [3, H, W] float32 in [0, 1], torchvision's target).

    The target holds boxes [n, 4] (x1, y1, x2, y2 in pixels), labels [n] in 1..classes in the order of the categories' ids, masks [n, H, W]
    uint8 if the file has any, area [n], iscrowd [n] and image_id. Targets omit crowds and annotations that are not trained on
    (`coco_check.RULES`). An object whose mask is missing or damaged is kept: its mask has the pixels that can be decoded, possibly none.
    Evaluation takes the annotations from `ground_truth`.

    A training set omits images without an object, unless `keep_empty` is set. It replaces an image that is damaged, or whose size differs
    from that in the file, by the next one. A validation set decodes all images in advance.

    `transforms` maps (tv_tensors.Image uint8, target) to another such pair, for instance by torchvision.transforms.v2. See `ImageFiles`.

    Args:
        annotations: JSON file.
        images: folder of the files that it names.
        class_names: names of its categories in the order of their ids; numbers are allowed, because a command line turns digits into
            numbers.
        train: whether the set is trained on.
        keep_empty: whether to train also on images without an object.
        allow_outside: whether file names in the annotations may lead out of the folder `images`.
        share: the part of the images to take instead of all, as fractions in the order of `splits.take_share`: [0, 0.8] are the first four
            fifths. A training and a validation set can thus have one file.
        reading: see `carafepp.tasks.images.ReadOptions`.

    Attributes:
        groups: 1 for every upright image, 0 for every other, so that most batches have images of one orientation.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the annotations cannot be used, or have other categories; the message names file, image and rule.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        class_names: Sequence[str],
        *,
        train: bool = False,
        keep_empty: bool = False,
        allow_outside: bool = False,
        share: Sequence[float] | None = None,
        transforms: Callable[[Tensor, dict], tuple] | None = None,
        seed: int = 0,
        **reading: Unpack[ReadOptions],
    ) -> None:
        self.annotations, self.images, self.train, self.share = annotations, Path(images), train, share
        content = self._read_annotations()
        if share is not None:
            part = "training" if train else "validation"
            logger.warning("%s: %d of its images are the %s set, share=%s", annotations, len(content["images"]), part, list(share))
        problems = check_annotations(content, images, allow_outside=allow_outside)
        if not train and not any(problem.rule == "image file missing" for problem in problems):
            problems += check_images(content, images, allow_outside=allow_outside, **reading)
        refuse_or_count(problems, annotations)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        names = [str(name) for name in class_names]
        if [str(category.get("name")) for category in categories] != names:
            found = ", ".join(f"{category['id']} {category.get('name')}" for category in categories)
            raise ValueError(f"class_names must be the categories of {annotations} by their ids, {found or 'none'}, got {', '.join(names)}")
        super().__init__(transforms, seed, skip_damaged=train, **reading)
        self.keep_empty = keep_empty
        self.unusable = {problem.position for problem in problems if problem.severity == UNUSABLE}
        self.damaged_masks = {problem.position for problem in problems if problem.severity in (UNMASKED, REPAIRED)}
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        usable = (a for position, a in enumerate(content["annotations"]) if position not in self.unusable and not a["iscrowd"])
        self.masks = any(read_mask(a.get("segmentation"), sizes[a["image_id"]]).has_pixels for a in usable)
        labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
        self._keep(content, labels, self.unusable | {problem.position for problem in problems if problem.severity == UNTRAINED})

    def _read_annotations(self) -> dict:
        """Read the annotation file without the images that are not in the share, and without their annotations."""
        content = read_annotations(self.annotations)
        return content if self.share is None else take_share(content, self.share)

    def _keep(self, content: dict, labels: dict[int, int], left_out: set[int | None]) -> None:
        """Keep the records from which `read` builds items."""
        objects = defaultdict(list)
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for position, annotation in enumerate(content["annotations"]):
            if position not in left_out and not annotation["iscrowd"]:
                shape = annotation.get("segmentation") if self.masks else None
                if position in self.damaged_masks:
                    shape = read_mask(shape, sizes[annotation["image_id"]]).shape
                objects[annotation["image_id"]].append((labels[annotation["category_id"]], annotation["bbox"], annotation["area"], shape))
        kept = [image for image in content["images"] if objects[image["id"]] or self.keep_empty or not self.train]
        if not kept or (self.train and not any(objects.values())):
            raise ValueError(f"annotations={self.annotations} has no object to train on")
        if empty := len(content["images"]) - len(kept):
            logger.info("%s: omitted %d images without an object to train on", self.annotations, empty)
        self.groups = [int(image["height"] > image["width"]) for image in kept]
        records = [pickle.dumps((image["id"], image["file_name"], image["height"], image["width"], objects[image["id"]])) for image in kept]
        # one array, because changes of reference counts would copy Python objects into every worker
        self.ends = np.cumsum([len(record) for record in records])
        self.records = np.frombuffer(b"".join(records), np.uint8)

    def ground_truth(self) -> dict:
        """Return the content of the annotation file, including crowds, without the unusable annotations.

        If a mask is missing or damaged, and other objects have one, its segmentation has the pixels that can be decoded, possibly none.
        """
        content = self._read_annotations()
        sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
        for position in self.damaged_masks if self.masks else ():
            annotation = content["annotations"][position]
            height, width = sizes[annotation["image_id"]]
            shape = read_mask(annotation.get("segmentation"), (height, width)).shape
            annotation["segmentation"] = shape or {"size": [height, width], "counts": [height * width]}
        content["annotations"] = [a for position, a in enumerate(content["annotations"]) if position not in self.unusable]
        return content

    def __len__(self) -> int:
        return len(self.ends)

    def read(self, index: int) -> tuple[tv_tensors.Image, dict]:
        """Read an image and its target."""
        image_id, name, height, width, objects = pickle.loads(self.records[self.ends[index - 1] if index else 0 : self.ends[index]].data)
        path = self.images / name
        image = read_image(path, **self.reading)
        if image.size != (width, height):
            hint = suggest_orientation(image.size, (width, height), **self.reading)
            raise ValueError(f"image {path} is {image.width} x {image.height}, {self.annotations} says {width} x {height}{hint}")
        return tv_tensors.Image(image), self._target(image_id, (height, width), objects)

    def transform(self, sample: tuple[tv_tensors.Image, dict]) -> tuple[Tensor, dict]:
        """Apply the transforms to image and target together."""
        return self.transforms(*sample)

    def _target(self, image_id: int, size: tuple[int, int], objects: list[tuple]) -> dict:
        boxes = torch.tensor([clip_box(box, size) for _, box, _, _ in objects], dtype=torch.float32).reshape(-1, 4)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # pyright: ignore[reportCallIssue]
            "labels": torch.tensor([label for label, *_ in objects], dtype=torch.int64),
            "area": torch.tensor([area for _, _, area, _ in objects], dtype=torch.float32),
            "iscrowd": torch.zeros(len(objects), dtype=torch.int64),
            "image_id": image_id,
        }
        if self.masks:
            masks = np.stack([np.zeros(size, np.uint8), *(decode_mask(mask, size) for *_, mask in objects)])[1:]
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return target
