"""ImageNet-1k, or any images in its layout: train/ and val/, each with one folder of images for each class."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from PIL import Image

from .image_files import ImageFiles
from .images import ReadOptions, is_folder, is_hidden, is_image, read_image, walk_images
from .splits import check_split

logger = logging.getLogger(__name__)

# A shell command that sorts the flat folder of ImageNet's validation archive by the list in Kaggle's archive.
SORT = (
    "tail -n +2 LOC_val_solution.csv | while IFS=', ' read -r image class rest; "
    'do mkdir -p "val/$class" && mv "val/$image.JPEG" "val/$class/"; done'
)


def find_classes(folder: Path) -> list[str]:
    """Return the sorted names of the folders of classes; hidden folders are ignored.

    Raises:
        FileNotFoundError: there is no folder of a class.
    """
    with os.scandir(folder) as entries:
        found = [(entry.name, is_folder(entry)) for entry in entries if not is_hidden(entry.name)]
    classes = sorted(name for name, holds_images in found if holds_images)
    loose = [name for name, holds_images in found if not holds_images and is_image(Path(name))]
    if not classes and loose:
        hint = f". For ImageNet's, this command in the folder above does so, from the list of Kaggle's archive: {SORT}"
        raise FileNotFoundError(
            f"{folder} holds {len(loose)} images and no folder for each class: move each image into the folder of its class"
            + (hint if folder.name == "val" else "")
        )
    if not classes:
        raise FileNotFoundError(f"{folder} holds no folder for each class")
    if loose:
        logger.warning("%s: %d images outside the folders of the classes are not used, the first is %s", folder, len(loose), min(loose))
    return classes


class ImageNet(ImageFiles):
    """Images with the number of their class: item (image [3, H, W] float32 in [0, 1], label); labels follow the sorted folder names.

    `transforms` maps a PIL image to another, for instance by torchvision.transforms.v2. In training, a damaged image is replaced by the
    next one; in validation it is an error. See `ImageFiles`.

    Raises:
        FileNotFoundError: a folder is missing or empty, or holds images that are not sorted by classes.
        ValueError: there are more classes than `classes`, or train/ and val/ have different classes.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transforms: Callable[[Image.Image], Image.Image] | None = None,
        seed: int = 0,
        classes: int = 1000,
        **reading: Unpack[ReadOptions],
    ) -> None:
        check_split(split)
        root = Path(root)
        if not (root / split).is_dir():
            raise FileNotFoundError(
                f"{root / split} is missing: root={root} should hold train/ and val/, each with a folder for each class"
            )
        self.class_names = find_classes(root / split)
        self.samples = [
            (path, label)
            for label, name in enumerate(self.class_names)
            # the order of torchvision's ImageFolder: the images of a folder come before those of its folders
            for path in sorted(walk_images(root / split / name), key=os.path.split)
        ]
        if empty := sorted(set(range(len(self.class_names))) - {label for _, label in self.samples}):
            raise FileNotFoundError(f"{len(empty)} folders of classes in {root / split} hold no image: {self.class_names[empty[0]]}")
        if split == "val" and (root / "train").is_dir():
            trained = find_classes(root / "train")
            if odd := sorted(set(trained) ^ set(self.class_names)):
                raise ValueError(
                    f"train/ and val/ of {root} must have the same classes, {len(odd)} are in only one of them, the first is {odd[0]}"
                )
        if len(self.class_names) > classes:
            raise ValueError(f"{root / split} has {len(self.class_names)} classes, more than num_classes={classes}")
        if len(self.class_names) < classes:
            logger.warning("%s has %d classes, the network %d (num_classes)", root / split, len(self.class_names), classes)
        super().__init__(transforms, seed, skip_damaged=split == "train", **reading)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Read an image and the number of its class."""
        path, label = self.samples[index]
        return read_image(path, **self.reading), label
