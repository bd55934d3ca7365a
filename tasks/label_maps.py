"""The base of data sets with an annotation file that gives every pixel of an image a label."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from .image_files import ImageFiles
from .images import read_image

IGNORED = 255


class LabelMaps(ImageFiles):
    """Images with a map of classes: item (image [3, H, W] float32 in [0, 1], map [H, W] int64), 255 where the class is ignored.

    `transforms` maps (tv_tensors.Image uint8, tv_tensors.Mask int64) to another such pair, for instance by torchvision.transforms.v2; a
    transform that pads must fill the mask with 255. A damaged file is also an error in training. See `ImageFiles`.

    Args:
        images, annotations: the files, in the same order; annotations are 8-bit grey or indexed.
        classes: maps each label that the annotations may hold to a class, or to 255.

    Attributes:
        num_classes: the number of classes that labels are mapped to.

    Raises:
        FileNotFoundError: an image has no annotation.
        ValueError: when an item is read, its file cannot be read, image and annotation differ in size, or the annotation holds another
            label; the message names the file.
    """

    def __init__(
        self,
        images: Sequence[Path],
        annotations: Sequence[Path],
        classes: Mapping[int, int],
        transforms: Callable[[Tensor, Tensor], tuple] | None = None,
        seed: int = 0,
    ) -> None:
        # each folder is listed once, because a query for every file takes minutes on network file systems
        present = {path for folder in {path.parent for path in annotations} if folder.is_dir() for path in folder.iterdir()}
        if missing := [path for path in annotations if path not in present]:
            raise FileNotFoundError(f"{len(missing)} of {len(images)} images have no annotation, the first is {missing[0]}")
        super().__init__(transforms, seed, skip_damaged=False)
        self.images, self.annotations = list(images), list(annotations)
        self.num_classes = 1 + max(value for value in classes.values() if value != IGNORED)
        # -1 marks labels that must not occur
        self.table = torch.full([256], -1)
        self.table[list(classes)] = torch.tensor(list(classes.values()))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Read an image and its map."""
        image = tv_tensors.Image(read_image(self.images[index]))
        labels = self._labels(self.annotations[index])
        if image.shape[-2:] != labels.shape:
            raise ValueError(
                f"image and annotation must have the same size, got (height, width) {tuple(image.shape[-2:])} of {self.images[index]} "
                f"and {tuple(labels.shape)} of {self.annotations[index]}"
            )
        return image, tv_tensors.Mask(labels)

    def transform(self, sample: tuple[tv_tensors.Image, tv_tensors.Mask]) -> tuple[Tensor, Tensor]:
        """Apply the transforms to image and map together."""
        return self.transforms(*sample)

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
