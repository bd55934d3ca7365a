"""ADE20K in the layout of ADEChallengeData2016: images/ and annotations/, each with training/ and validation/."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from torch import Tensor

from .images import ReadOptions
from .label_maps import IGNORED, LabelMaps, list_images
from .splits import check_split

FOLDERS = {"train": "training", "val": "validation"}


def class_names(root: str | Path) -> list[str]:
    """Read the names of the classes from objectInfo150.txt, starting at class 0 (label 1 of the files).

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the file is not a text in UTF-8.
    """
    path = Path(root) / "objectInfo150.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it comes with ADEChallengeData2016 and names the classes")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}") from error
    return [line.split("\t")[-1].strip() for line in lines[1:] if line.strip()]


class ADE20K(LabelMaps):
    """The 20,210 training or 2,000 validation images; `LabelMaps` describes items, transforms and errors.

    The files use label 0 for unlabelled pixels and 1..classes for the classes; the map uses 255, which is ignored, and 0..classes - 1.

    Args:
        root, split, transforms, seed, palette, reading: see `LabelMaps`; the split is "train" or "val".
        classes: the number of classes.
        labels: maps each label of the files to a class, or to 255, instead; for your own files in this layout.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: `split` or `classes` is out of its domain, or two images have the same name except for its suffix.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transforms: Callable[[Tensor, Tensor], tuple] | None = None,
        seed: int = 0,
        classes: int = 150,
        labels: Mapping[int, int] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        **reading: Unpack[ReadOptions],
    ) -> None:
        check_split(split)
        if not 1 <= classes <= IGNORED:
            raise ValueError(f"classes must be in 1..{IGNORED}, so that {IGNORED} can mean ignored, got {classes}")
        images, annotations = (Path(root) / kind / FOLDERS[split] for kind in ("images", "annotations"))
        for folder in (images, annotations):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is missing: root={root} should hold images/ and annotations/, as ADEChallengeData2016")
        paths = list_images(images)
        if labels is None and palette is not None:
            labels = {label: label for label in range(len(palette))}
        if labels is None:
            labels = {0: IGNORED} | {label: label - 1 for label in range(1, classes + 1)}
        super().__init__(paths, [annotations / f"{path.stem}.png" for path in paths], labels, transforms, seed, palette, **reading)
