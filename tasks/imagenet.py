"""ImageNet-1k, or any images in its layout: train/ and val/, each with one folder of images for each class."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.transforms.v2 import functional as F

from .images import is_image, read_image
from .keyed import keyed_rng, sample_key
from .photographs import check_split

logger = logging.getLogger(__name__)

# Damaged files in a row after which the set is taken to be damaged as a whole.
MOST_DAMAGED = 20


class ImageNet(Dataset):
    """Images with the number of their class: item (image [3, H, W] float32 in 0..1, label), labels by the sorted names of the folders.

    `transforms` maps a PIL image to the like, by torchvision.transforms.v2 for instance. Its randomness is a function of
    (seed, epoch, index): `data[index]` is of epoch 0, `data[epoch, index]` of any.

    A training image that cannot be read is reported and its place taken by the next one, so that one damaged file in a million does not end
    a training; in validation it is an error, since the score would be of another set.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: there are more classes than `classes`, or train/ and val/ have different ones; on access, naming the file: a validation
            image, or too many training images in a row, cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transforms: Callable[[Image.Image], Image.Image] | None = None,
        seed: int = 0,
        classes: int = 1000,
    ):
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
                    f"train/ and val/ of {root} must have the same classes, {len(odd)} are in one alone, the first is {odd[0]}"
                )
        if len(self.class_names) > classes:
            raise ValueError(f"{root / split} has {len(self.class_names)} classes, more than num_classes={classes}")
        if len(self.class_names) < classes:
            logger.warning("%s has %d classes, the network %d (num_classes)", root / split, len(self.class_names), classes)
        self.split, self.transforms, self.seed = split, transforms, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = sample_key(key, len(self))
        image, label = self._read(index)
        if self.transforms is not None:
            with keyed_rng(self.seed, epoch, index):
                image = self.transforms(image)
        return F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True), label

    def _read(self, index: int) -> tuple[Image.Image, int]:
        for attempt in itertools.count():
            path, label = self.samples[(index + attempt) % len(self)]
            try:
                return read_image(path), label
            except (ValueError, FileNotFoundError) as error:
                if self.split == "val" or attempt == MOST_DAMAGED:
                    raise
                logger.warning("%s; the next image takes its place", error)
