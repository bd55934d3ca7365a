"""Photographs without labels: Places365 in the layouts of its archives, or any two folders of images."""

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from PIL import Image

from .image_files import ImageFiles
from .images import ReadOptions, read_image, walk_images
from .splits import check_split

# Folders of a split: the first is that of the "easy directory" archive, the others those of the original archives.
FOLDERS = {"train": ("train", "data_256_standard", "data_large_standard", "data_256", "data_large"), "val": ("val", "val_256", "val_large")}


class Places(ImageFiles):
    """Photographs: item [3, H, W] float32 in [0, 1]. Images may lie in folders of classes; the classes are not used.

    `transforms` maps a PIL image to another, for instance by torchvision.transforms.v2. In training, a damaged image is replaced by the
    next one; in validation it is an error. See `ImageFiles`.

    Raises:
        FileNotFoundError: the split's folder is missing or holds no image.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transforms: Callable[[Image.Image], Image.Image] | None = None,
        seed: int = 0,
        **reading: Unpack[ReadOptions],
    ) -> None:
        check_split(split)
        folder = next((Path(root) / name for name in FOLDERS[split] if (Path(root) / name).is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"root={root} should hold the {split} images in a folder {' or '.join(FOLDERS[split])}")
        self.names = sorted(walk_images(folder))
        if not self.names:
            raise FileNotFoundError(f"{folder} holds no images")
        super().__init__(transforms, seed, skip_damaged=split == "train", **reading)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[Image.Image]:
        """Read a photograph."""
        return (read_image(self.names[index], **self.reading),)
