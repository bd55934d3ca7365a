"""ADE20K in the layout of ADEChallengeData2016: images/ and annotations/, each with training/ and validation/."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .images import is_image, read_image
from .keyed import keyed_rng, sample_key
from .photographs import check_split

IGNORED = 255
FOLDERS = {"train": "training", "val": "validation"}


def class_names(root: str | Path) -> list[str]:
    """The names of the classes by objectInfo150.txt, from class 0 (label 1 of the files) on.

    Raises FileNotFoundError where the folder has no such file.
    """
    path = Path(root) / "objectInfo150.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it comes with ADEChallengeData2016 and names the classes")
    return [line.split("\t")[-1].strip() for line in path.read_text().splitlines()[1:] if line.strip()]


class ADE20K(Dataset):
    """Images with a map of classes: item (image [3, H, W] float32 in 0..1, map [H, W] int64).

    In the files label 0 means unlabelled and 1..classes are the classes; in the map they are 255, to be ignored, and 0..classes - 1.

    `transforms` maps (tv_tensors.Image uint8, tv_tensors.Mask int64) to the like, by torchvision.transforms.v2 for instance; where it pads,
    let it fill the mask with 255. Its randomness is a function of (seed, epoch, index): `data[index]` is of epoch 0, `data[epoch, index]`
    of any.

    Raises:
        FileNotFoundError: a folder is missing or empty, or an image has no annotation.
        ValueError: on access, naming the file: it cannot be read, image and annotation differ in size, a label exceeds `classes`.
    """

    def __init__(
        self, root: str | Path, split: str, transforms: Callable[[Tensor, Tensor], tuple] | None = None, seed: int = 0, classes: int = 150
    ):
        check_split(split)
        if not 1 <= classes <= IGNORED:
            raise ValueError(f"classes must be in 1..{IGNORED}, so that {IGNORED} can mean ignored, got {classes}")
        images, annotations = (Path(root) / kind / FOLDERS[split] for kind in ("images", "annotations"))
        for folder in (images, annotations):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is missing: root={root} should hold images/ and annotations/, as ADEChallengeData2016")
        self.images = sorted(path for path in images.iterdir() if is_image(path))
        if not self.images:
            raise FileNotFoundError(f"{images} holds no images")
        self.annotations = [annotations / f"{path.stem}.png" for path in self.images]
        present = {path.name for path in annotations.iterdir()}
        if missing := [path for path in self.annotations if path.name not in present]:
            raise FileNotFoundError(f"{len(missing)} of {len(self.images)} images have no annotation, the first is {missing[0]}")
        self.transforms, self.seed, self.classes = transforms, seed, classes

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
        if labels.max() > self.classes:
            raise ValueError(f"annotation {path} has label {labels.max()}, labels must be in 0..{self.classes}")
        return torch.from_numpy(labels.astype(np.int64)).sub_(1).remainder_(IGNORED + 1)
