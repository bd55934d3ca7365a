"""The base of data sets whose samples are read from image files."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from .images import ReadOptions, lift_size_limit
from .keyed import keyed_rng, split_key

logger = logging.getLogger(__name__)

# After this many damaged files in a row, reading ends with an error.
MOST_DAMAGED = 20


class ImageFiles(Dataset, ABC):
    """Base of data sets that read samples, transform them and return tensors, the image [3, H, W] as float32 in [0, 1].

    A subclass has a length and reads one sample, see `read`. The randomness of the transforms is a function of (seed, epoch, index):
    `data[index]` belongs to epoch 0, `data[epoch, index]` to any epoch.

    With `skip_damaged`, a sample that cannot be read is logged as a warning and replaced by the next one, so that one damaged file in a
    million does not end a training. Without it, such a sample is an error, because a score would belong to another set.

    Args:
        transforms: see `transform`; None leaves samples as they are.
        seed: fixes the randomness of the transforms.
        skip_damaged: replace samples that cannot be read.
        ignore_orientation, allow_huge: see `carafepp.tasks.images.ReadOptions`.

    Attributes:
        reading: these two options, which a subclass passes on to `read_image`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or cannot be used when it is accessed, or too many in a row; the message names it.
    """

    def __init__(
        self,
        transforms: Callable | None,
        seed: int,
        *,
        skip_damaged: bool,
        ignore_orientation: bool = False,
        allow_huge: bool = False,
    ) -> None:
        # `transform` is not called if it is None
        self.transforms: Any = transforms
        self.seed, self.skip_damaged = seed, skip_damaged
        self.reading: ReadOptions = {"ignore_orientation": ignore_orientation, "allow_huge": allow_huge}

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def read(self, index: int) -> tuple[Any, ...]:
        """Read a sample: an image as PIL or uint8 [3, H, W], and its label or target, if any.

        Raises:
            FileNotFoundError, ValueError: a file is missing or cannot be used; the message names it.
        """

    def transform(self, sample: tuple[Any, ...]) -> tuple[Any, ...]:
        """Apply the transforms to the image alone."""
        return self.transforms(sample[0]), *sample[1:]

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        """Return the sample `index` or `(epoch, index)` as a tuple, or as a single image if it has no label or target."""
        epoch, index = split_key(key, len(self))
        sample = self._read_or_next(index)
        if self.transforms is not None:
            # Pillow also limits the size of crops
            with keyed_rng(self.seed, epoch, index), lift_size_limit(self.reading.get("allow_huge", False)):
                sample = self.transform(sample)
        image, *rest = sample
        pixels = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
        pixels = F.to_dtype(pixels, torch.float32, scale=True).as_subclass(Tensor)
        return (pixels, *map(to_plain, rest)) if rest else pixels

    def _read_or_next(self, index: int) -> tuple[Any, ...]:
        damaged = 0
        while True:
            try:
                return self.read((index + damaged) % len(self))
            except (FileNotFoundError, ValueError) as error:
                if not self.skip_damaged or damaged == MOST_DAMAGED:
                    raise
                logger.warning("%s; the next image takes its place", error)
            damaged += 1


def to_plain(value: Any) -> Any:
    """Turn tv_tensors, including those of a target {name: value}, into plain tensors."""
    if isinstance(value, dict):
        return {name: to_plain(each) for name, each in value.items()}
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value
