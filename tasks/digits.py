"""Scanned digits as a data set: the 1,797 scans that scikit-learn contains; nothing is downloaded."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from .keyed import keyed_rng, split_key
from .photographs import load_digit_scans


class Digits(Dataset):
    """Items (image [3, size, size] float32 in [0, 1], digit): light ink on black, enlarged from 8 x 8 pixels.

    `transforms` maps an image [3, size, size] to another; its randomness is a function of (seed, epoch, index), see
    `carafepp.tasks.keyed`. Nearly all validation scans are of writers that training does not see.
    """

    def __init__(self, split: str, size: int = 64, transforms: Callable[[Tensor], Tensor] | None = None, seed: int = 0) -> None:
        scans = load_digit_scans(split)
        resized = (F.resize(scan, [size, size]) for digit in scans for scan in digit)  # pyright: ignore[reportArgumentType]
        self.images = torch.stack([F.pil_to_tensor(scan) for scan in resized])
        self.labels = [digit for digit, of_digit in enumerate(scans) for _ in of_digit]
        self.transforms, self.seed = transforms, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = split_key(key, len(self))
        image = F.to_dtype(self.images[index].expand(3, -1, -1), torch.float32, scale=True)
        if self.transforms is not None:
            with keyed_rng(self.seed, epoch, index):
                image = self.transforms(image)
        return image, self.labels[index]
