"""ImageNet-1k, or any images in its layout: train/ and val/, each with one folder of images for each class."""

import logging
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes

from .image_files import ImageFiles
from .images import is_image, read_image
from .splits import check_split

logger = logging.getLogger(__name__)


class ImageNet(ImageFiles):
    """Images with the number of their class: item (image [3, H, W] float32 in [0, 1], label); labels follow the sorted folder names.

    `transforms` maps a PIL image to another, for instance by torchvision.transforms.v2. In training, a damaged image is replaced by the
    next one; in validation it is an error. See `ImageFiles`.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: there are more classes than `classes`, or train/ and val/ have different classes.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transforms: Callable[[Image.Image], Image.Image] | None = None,
        seed: int = 0,
        classes: int = 1000,
    ) -> None:
        check_split(split)
        root = Path(root)
        if not (root / split).is_dir():
            raise FileNotFoundError(
                f"{root / split} is missing: root={root} should hold train/ and val/, each with a folder for each class"
            )
        folder = ImageFolder(str(root / split), is_valid_file=lambda path: is_image(Path(path)))
        self.samples, self.class_names = folder.samples, folder.classes
        if split == "val" and (root / "train").is_dir():
            trained, _ = find_classes(root / "train")
            if odd := sorted(set(trained) ^ set(self.class_names)):
                raise ValueError(
                    f"train/ and val/ of {root} must have the same classes, {len(odd)} are in only one of them, the first is {odd[0]}"
                )
        if len(self.class_names) > classes:
            raise ValueError(f"{root / split} has {len(self.class_names)} classes, more than num_classes={classes}")
        if len(self.class_names) < classes:
            logger.warning("%s has %d classes, the network %d (num_classes)", root / split, len(self.class_names), classes)
        super().__init__(transforms, seed, skip_damaged=split == "train")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Read an image and the number of its class."""
        path, label = self.samples[index]
        return read_image(path), label
