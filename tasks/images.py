"""Search for image files, and reading of image files of any kind as RGB."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypedDict, Unpack

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.ImageFile import ImageFile

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".avif", ".jp2")

# Folders that file systems, archives and photo servers leave behind; some hold copies of the images.
FOREIGN_FOLDERS = ("__MACOSX", "@eaDir", "lost+found")


def is_hidden(name: str) -> bool:
    """Return whether a file or folder with this name, such as .ipynb_checkpoints, is not part of a data set."""
    return (name.startswith(".") and name not in (".", "..")) or name in FOREIGN_FOLDERS


def is_image(path: Path) -> bool:
    """Return whether the name of `path` is that of an image file that is not hidden."""
    return path.suffix.lower() in SUFFIXES and not is_hidden(path.name)


def is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    # a link to itself
    except OSError:
        return False


def walk_images(folder: str | Path, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the image files below a folder, in no fixed order; hidden files and folders are ignored.

    Links to folders are followed, except those to a folder that holds them, which would repeat its images; `above` are the folders on the
    way to `folder`.

    Raises:
        OSError: a folder cannot be read.
    """
    real = os.path.realpath(folder)
    if any(os.path.join(each, "").startswith(os.path.join(real, "")) for each in above):
        return
    with os.scandir(folder) as entries:
        found = [(entry.path, is_folder(entry)) for entry in entries if not is_hidden(entry.name)]
    for path, leads_on in found:
        # strings, because a million Path objects take a gigabyte
        if leads_on:
            yield from walk_images(path, above | {real})
        elif is_image(Path(path)):
            yield path


class ReadOptions(TypedDict, total=False):
    """Options of reading image files, under one name in all data sets and commands; both are false if they are not given.

    `ignore_orientation` leaves the EXIF orientation unapplied, for annotations that were made on the pixels as they are stored.
    `allow_huge` reads images of any size; without it, images of more than twice Pillow's MAX_IMAGE_PIXELS are an error.
    """

    ignore_orientation: bool
    allow_huge: bool


_lifting = threading.Lock()
# for every use of `lift_size_limit` in this process, the limit that it found; all but the first found none
_found_limits: list[int | None] = []


@contextmanager
def lift_size_limit(lift: bool) -> Iterator[None]:
    """If `lift` is set, let Pillow decode and crop images of any size; its limit is that of the process, so that no thread has one then."""
    if not lift:
        yield
        return
    with _lifting:
        _found_limits.append(Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _lifting:
            limit = _found_limits.pop()
            # threads may overlap, and the last one restores the limit
            if not _found_limits:
                Image.MAX_IMAGE_PIXELS = limit


def suggest_orientation(found: tuple[int, ...], expected: tuple[int, ...], **reading: Unpack[ReadOptions]) -> str:
    """Return a hint for the error message of an image whose size differs from the expected one, "" if it is not on its side."""
    if reading.get("ignore_orientation") or found == expected or found != expected[::-1]:
        return ""
    return "; if the pixels as they are stored have that size, ignore_orientation=true leaves the EXIF orientation unapplied"


def read_image(path: str | Path | BinaryIO, kind: str = "image", **reading: Unpack[ReadOptions]) -> Image.Image:
    """Read an image file as 8-bit RGB, turned as its EXIF orientation says, unless `ignore_orientation` is set.

    Grey, 16-bit grey, palette and CMYK images are converted; transparent pixels keep the colour that the file gives them. Floats in [0, 1]
    are scaled to 8 bits. Whole floats, and integers of 16 or 32 bits, are taken as they are where all are in 0..255; other integers are
    taken for values in 0..65535. Of several frames, the first one is read.

    Args:
        path: the file, or its content as a stream.
        kind: the name of the file in error messages.
        reading: see `ReadOptions`.

    Raises:
        FileNotFoundError: there is no such file; the message names it.
        ValueError: the file cannot be decoded, for instance because it is truncated, has another range of values, or is larger than
            Pillow's limit without `allow_huge`; the message names it.
    """
    return read_converted(path, kind, _convert, **reading)


def read_layer(path: str | Path, kind: str = "image", **reading: Unpack[ReadOptions]) -> Image.Image:
    """Read an image file with its transparency as 8-bit RGBA; see `read_image`."""

    def convert(image: Image.Image) -> Image.Image:
        return (image if image.has_transparency_data else _convert(image)).convert("RGBA")

    return read_converted(path, kind, convert, **reading)


def read_converted(
    path: str | Path | BinaryIO,
    kind: str,
    convert: Callable[[Image.Image], Image.Image],
    check: Callable[[ImageFile], None] | None = None,
    **reading: Unpack[ReadOptions],
) -> Image.Image:
    """Decode an image file, turn it, and return what `convert` makes of it; see `read_image`.

    `check` sees the file before it is decoded, and may raise a ValueError.
    """
    size = "its pixels"
    try:
        with lift_size_limit(reading.get("allow_huge", False)), Image.open(path) as image:
            size = f"{image.width} x {image.height} pixels"
            if check is not None:
                check(image)
            _check_strips(image)
            # without a name, Pillow does not map a file into memory: a mapped TIFF on its side would be scrambled
            image.filename = ""
            if reading.get("ignore_orientation"):
                # Pillow itself turns a TIFF while it decodes it
                image.getexif()[ExifTags.Base.Orientation] = 1
            return convert(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise FileNotFoundError(f"{kind} {path} does not exist") from None
    except Image.DecompressionBombError as error:
        told = str(error).partition(", ")[0]
        raise ValueError(f"{kind} {path} is larger than Pillow allows ({told}); allow_huge=true reads it nonetheless") from None
    except MemoryError:
        raise ValueError(f"{kind} {path} cannot be read: there is not enough memory for {size}") from None
    # what Pillow raises for damaged files depends on the decoder
    except Exception as error:
        raise ValueError(f"{kind} {path} cannot be read: {str(error) or type(error).__name__}") from error


def _check_strips(image: ImageFile) -> None:
    """Check that the strips or tiles of a TIFF reach its last row and column, because Pillow leaves the rest black without a warning.

    Raises:
        ValueError: they do not.
    """
    if image.format == "TIFF" and image.tile:
        # each has left, top, right and bottom; the size of the image may be that after its orientation, with sides exchanged
        boxes = [box for part in image.tile if (box := part[1])]
        columns, rows = (max((box[side] for box in boxes), default=0) for side in (2, 3))
        if columns * rows < image.width * image.height:
            raise ValueError(f"the file holds {columns} x {rows} of its {image.width} x {image.height} pixels")


def _convert(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_bytes(np.asarray(image), image.mode))
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale grey values of a mode of more than 8 bits to 0..255, as uint8.

    Raises:
        ValueError: the range of the values is not that of a common format.
    """
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    # comparisons with NaN are false
    if mode == "F" and 0 <= low <= high <= 1:
        return (values * 255).round().astype(np.uint8)
    if mode != "F" and low >= 0 and 255 < high <= 65535:
        return (values // 257).astype(np.uint8)
    if 0 <= low <= high <= 255 and (values == values.round()).all():
        return values.astype(np.uint8)
    kind, ranges = ("floats", "0 to 1, or whole numbers from 0 to 255") if mode == "F" else ("integers", "0 to 65,535")
    raise ValueError(f"mode {mode}, 32-bit {kind}, must have values from {ranges}, got {low} to {high}")
