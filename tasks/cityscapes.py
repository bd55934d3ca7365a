"""Cityscapes in its own layout: leftImg8bit/ and gtFine/, each with train/ and val/, which hold a folder for each city."""

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from torch import Tensor
from torchvision.datasets import Cityscapes as TorchvisionCityscapes

from .images import ReadOptions, is_hidden
from .label_maps import IGNORED, LabelMaps
from .splits import check_split

SUFFIX = "_leftImg8bit.png"


class Cityscapes(LabelMaps):
    """The 2,975 training or 500 validation images with fine annotations; `LabelMaps` describes items, transforms and errors.

    The labels of the files (gtFine_labelIds.png) become the 19 classes of the benchmark, or 255, which is ignored. torchvision's data set
    provides the table of labels. It is not used to list files, because its order is that of the file system.

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transforms: Callable[[Tensor, Tensor], tuple] | None = None,
        seed: int = 0,
        **reading: Unpack[ReadOptions],
    ) -> None:
        check_split(split)
        images, annotations = (Path(root) / kind / split for kind in ("leftImg8bit", "gtFine"))
        for folder in (images, annotations):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is missing: root={root} should hold leftImg8bit/ and gtFine/ of Cityscapes")
        paths = sorted(path for path in images.glob(f"*/*{SUFFIX}") if not is_hidden(path.name) and not is_hidden(path.parent.name))
        if not paths:
            raise FileNotFoundError(f"{images} holds no folders with images named *{SUFFIX}")
        masks = [annotations / path.parent.name / path.name.replace(SUFFIX, "_gtFine_labelIds.png") for path in paths]
        labels = {label.id: IGNORED if label.ignore_in_eval else label.train_id for label in TorchvisionCityscapes.classes if label.id >= 0}
        super().__init__(paths, masks, labels, transforms, seed, **reading)
