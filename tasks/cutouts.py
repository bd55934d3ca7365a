"""Cut-outs: images with transparency in one folder for each class, such as the stamps of Tux Paint, as the objects of scenes."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .splits import check_split

# Cut-outs are shrunk to this longer side, in pixels.
LONGER_SIDE = 128

# One file in this many, in an order by a hash of its path, belongs to the validation split.
VALIDATION_SHARE = 5

# A pixel with at least this alpha (of 255) belongs to the object.
OPAQUE = 128


# The images of each class.
Cutouts = tuple[tuple[Image.Image, ...], ...]


@functools.cache
def load_cutouts(folder: str, classes: tuple[str, ...], split: str) -> Cutouts:
    """Load the cut-outs of a split, once per process: for each class, RGBA images cropped to what is not transparent.

    Every PNG and WebP file with transparent pixels below `folder`/CLASS is a cut-out. Training and validation share no file, and the split
    depends on the paths in the folder alone.

    Raises:
        FileNotFoundError: there is no such folder, or none for a class.
        ValueError: a class has no cut-out for the split, or a file cannot be read.
    """
    check_split(split)
    root = Path(folder)
    if missing := [name for name in classes if not (root / name).is_dir()]:
        raise FileNotFoundError(
            f"scene.cutouts={folder} must have a folder of images with transparency for each class, and has none for {', '.join(missing)}; "
            "the stamps of Tux Paint come with: apt-get install tuxpaint-stamps-default"
        )
    found = tuple(tuple(_read_class(root, name, split)) for name in classes)
    if empty := [name for name, images in zip(classes, found, strict=True) if not images]:
        raise ValueError(f"scene.cutouts={folder} has no image with transparency for the {split} split of {', '.join(empty)}")
    return found


def _read_class(root: Path, name: str, split: str) -> Sequence[Image.Image]:
    """Read the cut-outs of a class and a split."""
    paths = [path for path in (root / name).rglob("*") if path.suffix.lower() in (".png", ".webp") and path.is_file()]
    paths.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    held_out = -(-len(paths) // VALIDATION_SHARE)
    images = []
    for path in paths[:held_out] if split == "val" else paths[held_out:]:
        try:
            with Image.open(path) as file:
                image = file.convert("RGBA")
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        image.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.LANCZOS)
        alpha = np.asarray(image)[..., 3]
        # neither a rectangle nor an invisible object
        if alpha.min() < OPAQUE <= alpha.max():
            images.append(image.crop(image.getchannel("A").point([0] * OPAQUE + [255] * (256 - OPAQUE)).getbbox()))
    return images


def place_cutout(rng: np.random.Generator, cutout: Image.Image, height: float, size: tuple[int, int]) -> np.ndarray:
    """Mirror, stretch, rotate and brighten a cut-out at random -> RGBA [h, w, 4] in 0..1, float32, no larger than `size`.

    Args:
        height: longer side of the object in pixels, before the rotation by at most 20 degrees.
    """
    mirror, angle, stretch, brightness = rng.uniform((0, -20, 0.85, 0.75), (1, 20, 1.15, 1.15))
    scale = height / max(cutout.size)
    sides = max(1, round(cutout.width * scale * stretch)), max(1, round(cutout.height * scale))
    # premultiplied, so that the colour below transparent pixels does not bleed into the edge
    image = cutout.convert("RGBa").resize(sides, Image.Resampling.LANCZOS).convert("RGBA")
    if mirror < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.convert("RGBa").rotate(angle, Image.Resampling.BICUBIC, expand=True).convert("RGBA")
    pixels = np.asarray(image.crop(image.getbbox()), np.float32)[: size[0], : size[1]] / 255
    pixels[..., :3] = np.minimum(pixels[..., :3] * brightness, 1)
    return pixels


def paint_cutout(patch: np.ndarray, pixels: np.ndarray) -> None:
    """Paint a cut-out [h, w, 4] on `patch` [3, h, w], in place."""
    colour, alpha = pixels[..., :3].transpose(2, 0, 1), pixels[..., 3]
    patch += alpha * (colour - patch)
