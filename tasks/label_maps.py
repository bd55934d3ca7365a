"""The base of data sets with an annotation file that gives every pixel of an image a label."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from PIL.ImageFile import ImageFile
from torch import Tensor
from torchvision import tv_tensors

from .image_files import ImageFiles
from .images import ReadOptions, is_image, read_converted, read_image, suggest_orientation

IGNORED = 255


class LabelMaps(ImageFiles):
    """Images with a map of classes: item (image [3, H, W] float32 in [0, 1], map [H, W] int64), 255 where the class is ignored.

    `transforms` maps (tv_tensors.Image uint8, tv_tensors.Mask int64) to another such pair, for instance by torchvision.transforms.v2; a
    transform that pads must fill the mask with 255. A damaged file is also an error in training. See `ImageFiles`.

    Args:
        images, annotations: the files, in the same order; annotations are 8-bit grey or indexed, or have the colours of `palette`.
        classes: maps each label that the annotations may hold to a class, or to 255.
        palette: colours (red, green, blue) in 0..255 whose positions are the labels; None if the annotations hold labels.
        reading: see `carafepp.tasks.images.ReadOptions`.

    Attributes:
        num_classes: the number of classes that labels are mapped to.

    Raises:
        FileNotFoundError: an image has no annotation.
        ValueError: a label or a class is not in 0..255, no label has a class, or the palette is not made of distinct colours.
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
        palette: Sequence[Sequence[int]] | None = None,
        **reading: Unpack[ReadOptions],
    ) -> None:
        self.palette = None if palette is None else _number_colors(palette)
        if not all(_is_byte(value) for pair in classes.items() for value in pair):
            raise ValueError(f"labels must map 0..255 to classes, or to {IGNORED}, got {dict(classes)}")
        if all(value == IGNORED for value in classes.values()):
            raise ValueError(f"labels must map a label to a class other than {IGNORED}, got {dict(classes)}")
        # each folder is listed once, because a query for every file takes minutes on network file systems
        present = {path for folder in {path.parent for path in annotations} if folder.is_dir() for path in folder.iterdir()}
        if missing := [path for path in annotations if path not in present]:
            raise FileNotFoundError(f"{len(missing)} of {len(images)} images have no annotation, the first is {missing[0]}")
        super().__init__(transforms, seed, skip_damaged=False, **reading)
        self.images, self.annotations = list(images), list(annotations)
        self.num_classes = 1 + max(value for value in classes.values() if value != IGNORED)
        # -1 marks labels that must not occur
        self.table = torch.full([256], -1)
        self.table[list(classes)] = torch.tensor(list(classes.values()))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Read an image and its map."""
        image = tv_tensors.Image(read_image(self.images[index], **self.reading))
        labels = self._labels(self.annotations[index])
        if image.shape[-2:] != labels.shape:
            hint = suggest_orientation(tuple(image.shape[-2:]), tuple(labels.shape), **self.reading)
            raise ValueError(
                f"image and annotation must have the same size, got (height, width) {tuple(image.shape[-2:])} of {self.images[index]} "
                f"and {tuple(labels.shape)} of {self.annotations[index]}{hint}"
            )
        return image, tv_tensors.Mask(labels)

    def transform(self, sample: tuple[tv_tensors.Image, tv_tensors.Mask]) -> tuple[Tensor, Tensor]:
        """Apply the transforms to image and map together."""
        return self.transforms(*sample)

    def _labels(self, path: Path) -> Tensor:
        convert = (lambda file: file) if self.palette is None else (lambda file: file.convert("RGB"))
        file = read_converted(path, "annotation", convert, _check_labels, **self.reading)
        labels = np.array(file)
        if self.palette is not None:
            labels = self._find_colors(labels, path)
        elif file.mode not in ("L", "P"):
            raise ValueError(f"annotation {path} must be an 8-bit grey or indexed PNG, got mode {file.mode}; a palette reads colours")
        mapped = self.table[torch.from_numpy(labels).long()]
        if mapped.min() < 0:
            valid = (self.table >= 0).nonzero()[:, 0].tolist()
            raise ValueError(f"annotation {path} has label {labels[mapped.numpy() < 0].max()}, labels must be in {_join(valid)}")
        return mapped

    def _find_colors(self, pixels: np.ndarray, path: Path) -> np.ndarray:
        """Return the positions of colours [H, W, 3] in the palette -> [H, W]."""
        assert self.palette is not None
        order = np.argsort(self.palette)
        numbers = _join_channels(pixels)
        found = order[np.searchsorted(self.palette[order], numbers).clip(max=len(order) - 1)]
        if (odd := self.palette[found] != numbers).any():
            raise ValueError(f"annotation {path} has the colour {pixels[odd][0].tolist()}, which the palette does not name")
        return found


class LabelMapFolders(LabelMaps):
    """The images of a folder, and of another folder the maps with the same names as PNG; `LabelMaps` describes items and errors.

    Args:
        images, annotations: the two folders.
        labels: maps each label that the maps may hold to a class, or to 255.
        transforms, seed, palette, reading: see `LabelMaps`.

    Raises:
        FileNotFoundError: the folder of images holds none.
        ValueError: two images have the same name except for its suffix.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        labels: Mapping[int, int],
        transforms: Callable[[Tensor, Tensor], tuple] | None = None,
        seed: int = 0,
        palette: Sequence[Sequence[int]] | None = None,
        **reading: Unpack[ReadOptions],
    ) -> None:
        paths = list_images(Path(images))
        super().__init__(paths, [Path(annotations) / f"{path.stem}.png" for path in paths], labels, transforms, seed, palette, **reading)


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder whose annotations have the same names as PNG.

    Raises:
        FileNotFoundError: the folder holds no images.
        ValueError: two images have the same name except for its suffix.
    """
    paths = sorted(path for path in folder.iterdir() if is_image(path))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no images")
    stems = Counter(path.stem for path in paths)
    if repeated := [path.name for path in paths if stems[path.stem] > 1]:
        raise ValueError(f"{folder} has several images for one annotation: {', '.join(repeated[:4])}")
    return paths


def find_labels(paths: Iterable[Path]) -> set[int]:
    """Return the labels that occur in annotations.

    Raises:
        FileNotFoundError, ValueError: a file cannot be read, or holds colours instead of labels; the message names it.
    """
    found: set[int] = set()
    for path in paths:
        file = read_converted(path, "annotation", lambda file: file, _check_labels)
        if file.mode not in ("L", "P"):
            raise ValueError(f"annotation {path} must be an 8-bit grey or indexed PNG, got mode {file.mode}")
        found.update(np.unique(np.array(file)).tolist())
    return found


def _check_labels(file: ImageFile) -> None:
    """Refuse a file whose pixels, when decoded, are not the labels that were written.

    Raises:
        ValueError: the format changes values, or Pillow scales them.
    """
    if file.format in ("JPEG", "MPO"):
        raise ValueError("it is a JPEG, which blurs labels: save it as PNG")
    if any(f"L;{bits}" in str(tile[3]) for tile in file.tile for bits in (2, 4)):
        raise ValueError("its grey values have 2 or 4 bits, which are scaled to 8: save it with 8 bits")


def _join(labels: Sequence[int]) -> str:
    """Write labels in ascending order as a range if they are one."""
    return f"{labels[0]}..{labels[-1]}" if labels[-1] - labels[0] == len(labels) - 1 else ", ".join(map(str, labels))


def _is_byte(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _join_channels(colors: np.ndarray) -> np.ndarray:
    """Return one number for each colour [..., 3]."""
    return colors.astype(np.int64) @ [65536, 256, 1]


def _number_colors(palette: Sequence[Sequence[int]]) -> np.ndarray:
    colors = [list(color) if isinstance(color, Sequence) else color for color in palette]
    if not all(isinstance(color, list) and len(color) == 3 and all(map(_is_byte, color)) for color in colors):
        raise ValueError(f"palette must be a list of colours [red, green, blue] in 0..255, got {colors}")
    numbers = _join_channels(np.array(colors).reshape(-1, 3))
    if not 0 < len(np.unique(numbers)) == len(numbers) <= 256:
        raise ValueError(f"palette must have 1 to 256 colours, each once, got {colors}")
    return numbers
