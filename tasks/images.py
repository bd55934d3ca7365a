"""Reading of image files of any kind as RGB."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def is_image(path: Path) -> bool:
    """Return whether the name of `path` is that of an image file that is not hidden."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_image(path: str | Path | BinaryIO, kind: str = "image") -> Image.Image:
    """Read an image file as 8-bit RGB, turned as its EXIF orientation says.

    Grey, 16-bit grey, palette and CMYK images are converted; transparent pixels keep the colour that the file gives them.

    Args:
        path: the file, or its content as a stream.
        kind: the name of the file in error messages.

    Raises:
        FileNotFoundError: there is no such file; the message names it.
        ValueError: the file cannot be decoded, for instance because it is truncated; the message names it.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I":
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{kind} {path} does not exist") from None
    # what Pillow raises for damaged files depends on the decoder
    except Exception as error:
        raise ValueError(f"{kind} {path} cannot be read: {error}") from error
