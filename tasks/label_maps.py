"""Image files with files that give every pixel a label, whatever data set they are of."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .images import read_image
from .keyed import keyed_rng, sample_key

IGNORED = 255


class LabelMaps(Dataset):
    """Images with a map of classes: item (image [3, H, W] float32 in 0..1, map [H, W] int64), 255 where the class is to be ignored.

    `transforms` maps (tv_tensors.Image uint8, tv_tensors.Mask int64) to the like, by torchvision.transforms.v2 for instance; where it pads,
    let it fill the mask with 255. Its randomness is a function of (seed, epoch, index): `data[index]` is of epoch 0, `data[epoch, index]`
    of any.

    Args:
        images, annotations: the files, in the same order; annotations are 8-bit grey or indexed.
        classes: class, or 255, of each label that the annotations may hold.

    `num_classes` is the number of classes that these are of.

    Raises:
        FileNotFoundError: an image has no annotation.
        ValueError: on access, naming the file: it cannot be read, image and annotation differ in size, it holds another label.
    """

    def __init__(
        self,
        images: Sequence[Path],
        annotations: Sequence[Path],
        classes: Mapping[int, int],
        transforms: Callable[[Tensor, Tensor], tuple] | None = None,
        seed: int = 0,
    ):
        # one listing a folder: asking for every file takes minutes on network file systems
        present = {path for folder in {path.parent for path in annotations} if folder.is_dir() for path in folder.iterdir()}
        if missing := [path for path in annotations if path not in present]:
            raise FileNotFoundError(f"{len(missing)} of {len(images)} images have no annotation, the first is {missing[0]}")
        self.images, self.annotations, self.transforms, self.seed = list(images), list(annotations), transforms, seed
        self.num_classes = 1 + max(value for value in classes.values() if value != IGNORED)
        # -1 marks labels that must not occur
        self.table = torch.full([256], -1)
        self.table[list(classes)] = torch.tensor(list(classes.values()))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = sample_key(key, len(self))
        image = tv_tensors.Image(read_image(self.images[index]))
        labels = self._labels(self.annotations[index])
        if image.shape[-2:] != labels.shape:
            raise ValueError(
                f"image and annotation must have the same size, got (height, width) {tuple(image.shape[-2:])} of {self.images[index]} "
                f"and {tuple(labels.shape)} of {self.annotations[index]}"
            )
        labels = tv_tensors.Mask(labels)
        if self.transforms is not None:
            with keyed_rng(self.seed, epoch, index):
                image, labels = self.transforms(image, labels)
        return F.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor), labels.as_subclass(Tensor)

    def _labels(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                mode, labels = file.mode, np.array(file)
        # what Pillow raises for damaged files depends on the decoder
        except Exception as error:
            raise ValueError(f"annotation {path} cannot be read: {error}") from error
        if mode not in ("L", "P"):
            raise ValueError(f"annotation {path} must be an 8-bit grey or indexed PNG, got mode {mode}")
        mapped = self.table[torch.from_numpy(labels).long()]
        if mapped.min() < 0:
            valid = (self.table >= 0).nonzero()[:, 0].tolist()
            raise ValueError(f"annotation {path} has label {labels[mapped.numpy() < 0].max()}, labels must be in {valid[0]}..{valid[-1]}")
        return mapped
