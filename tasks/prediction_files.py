"""Predictions as files for other programs: label maps, detections in COCO's format, a table of classes, filled photographs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import save_image

from .coco_eval import encode_masks, to_corner_and_size
from .writing import replace_file, write_atomically, write_csv


class PredictionFiles(Protocol):
    """Writer of the predictions for the images of a folder."""

    def add(self, name: str, size: tuple[int, int], prediction: Any) -> None:
        """Add what `Task.predict` returns for the image file `name`, whose own size is (height, width) in pixels."""

    def finish(self) -> Path:
        """Write what is not yet written, and return the file or folder."""
        ...


class PNGFolder:
    """A folder with a PNG for each image: a.png for a.jpg, and a.webp.png for a.webp, if it comes after a.jpg.

    Files of an earlier prediction in the folder are replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: set[str] = set()

    def name_file(self, name: str) -> Path:
        """Return the PNG for the image file `name`; the folder is made."""
        self.folder.mkdir(exist_ok=True)
        file = f"{Path(name).stem}.png"
        file = f"{name}.png" if file in self.names else file
        self.names.add(file)
        return self.folder / file

    def finish(self) -> Path:
        """Return the folder."""
        return self.folder


class LabelMapFiles(PNGFolder):
    """A folder labels/ with a PNG for each image, whose 8-bit grey values are the classes, and classes.txt with a name a line.

    Args:
        folder: the folder that holds labels/.
        class_names: names of the classes 0, 1, ...
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder / "labels")
        self.class_names = list(class_names)

    def add(self, name: str, size: tuple[int, int], prediction: Tensor) -> None:
        """Write labels [h, w], enlarged to the size of the image by nearest neighbour, as labels/a.png for a.jpg."""
        labels = F.interpolate(prediction[None, None].float(), size, mode="nearest-exact")[0, 0].to(torch.uint8)
        with replace_file(self.name_file(name), "wb") as file:
            Image.fromarray(labels.numpy()).save(file, "PNG")

    def finish(self) -> Path:
        """Write classes.txt."""
        write_atomically(self.folder / "classes.txt", "".join(f"{name}\n" for name in self.class_names))
        return super().finish()


class DetectionFile:
    """detections.json in COCO's annotation format, in pixels of the images; an annotation also has a score.

    Args:
        folder: the folder of the file.
        class_names: names of labels 1, 2, ..., which are the ids of the categories.
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        self.path = folder / "detections.json"
        self.categories = [{"id": label, "name": name} for label, name in enumerate(class_names, start=1)]
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, name: str, size: tuple[int, int], prediction: dict[str, Tensor]) -> None:
        """Add boxes, labels, scores and masks, if any, in an image whose size "image_size" in pixels the detector saw."""
        height, width = size
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        seen_height, seen_width = prediction["image_size"].tolist()
        boxes = prediction["boxes"] * torch.tensor([width / seen_width, height / seen_height]).repeat(2)
        masks: list[Any] = [None] * len(boxes)
        if "masks" in prediction:
            # one at a time, because those of a large photograph together take gigabytes
            enlarged = (F.interpolate(mask[None], size, mode="bilinear", align_corners=False)[0] > 0.5 for mask in prediction["masks"])
            masks = [encode_masks(mask)[0] for mask in enlarged]
        columns = to_corner_and_size(boxes), prediction["labels"].tolist(), prediction["scores"].tolist(), masks
        for box, label, score, mask in zip(*columns, strict=True):
            entry = {"id": len(self.annotations) + 1, "image_id": image_id, "category_id": label, "bbox": box, "area": box[2] * box[3]}
            self.annotations.append(entry | {"iscrowd": 0, "score": score} | ({"segmentation": mask} if mask else {}))

    def finish(self) -> Path:
        """Write the file."""
        content = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
        write_atomically(self.path, json.dumps(content) + "\n")
        return self.path


class ClassTable:
    """classes.csv: the file, the likeliest class with its probability, and the probability of every class.

    Args:
        folder: the folder of the file.
        class_names: names of the classes 0, 1, ...
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        self.path, self.class_names = folder / "classes.csv", list(class_names)
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, size: tuple[int, int], prediction: Tensor) -> None:
        """Add the probabilities [classes] of an image."""
        values = [round(value, 6) for value in prediction.tolist()]
        best = int(prediction.argmax())
        columns = {f"p({label})": value for label, value in zip(self.class_names, values, strict=True)}
        self.rows.append({"file": name, "class": self.class_names[best], "probability": values[best], **columns})

    def finish(self) -> Path:
        """Write the file."""
        write_csv(self.path, self.rows)
        return self.path


class FilledImages(PNGFolder):
    """A folder filled/ with the photographs whose holes are filled, as PNG.

    Args:
        folder: the folder that holds filled/.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "filled")

    def add(self, name: str, size: tuple[int, int], prediction: Tensor) -> None:
        """Write a photograph [3, H, W] in [0, 1] as filled/a.png for a.jpg."""
        with replace_file(self.name_file(name), "wb") as file:
            save_image(prediction, file, format="png")
