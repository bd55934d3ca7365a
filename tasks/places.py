"""Photographs alone: Places365 as its archives unpack, or any two folders of images."""

import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from .images import is_image, read_image
from .keyed import keyed_rng, sample_key
from .photographs import check_split

logger = logging.getLogger(__name__)

# Folders of a split: the first is that of the "easy directory" archive, the others those of the original ones.
FOLDERS = {"train": ("train", "data_256_standard", "data_large_standard", "data_256", "data_large"), "val": ("val", "val_256", "val_large")}

# Damaged files in a row after which the set is taken to be damaged as a whole.
MOST_DAMAGED = 20


class Places(Dataset):
    """Photographs: item [3, H, W] float32 in 0..1. Images may lie in folders of classes or not; the classes are not used.

    `transforms` maps a PIL image to the like, by torchvision.transforms.v2 for instance. Its randomness is a function of
    (seed, epoch, index): `data[index]` is of epoch 0, `data[epoch, index]` of any.

    A training image that cannot be read is reported and its place taken by the next one; in validation it is an error.

    Raises:
        FileNotFoundError: the split's folder is missing or holds no image.
        ValueError: on access, naming the file: a validation image, or too many training images in a row, cannot be read.
    """

    def __init__(self, root: str | Path, split: str, transforms: Callable[[Image.Image], Image.Image] | None = None, seed: int = 0):
        check_split(split)
        folder = next((Path(root) / name for name in FOLDERS[split] if (Path(root) / name).is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"root={root} should hold the {split} images of Places365 in a folder {' or '.join(FOLDERS[split])}")
        # names alone: a million Path objects take a gigabyte
        self.names = sorted(os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names if is_image(Path(name)))
        if not self.names:
            raise FileNotFoundError(f"{folder} holds no images")
        self.split, self.transforms, self.seed = split, transforms, seed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor:
        epoch, index = sample_key(key, len(self))
        image = self._read(index)
        if self.transforms is not None:
            with keyed_rng(self.seed, epoch, index):
                image = self.transforms(image)
        return F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True)

    def _read(self, index: int) -> Image.Image:
        for attempt in itertools.count():
            try:
                return read_image(self.names[(index + attempt) % len(self)])
            except (ValueError, FileNotFoundError) as error:
                if self.split == "val" or attempt == MOST_DAMAGED:
                    raise
                logger.warning("%s; the next image takes its place", error)
