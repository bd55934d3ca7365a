"""Holes for image inpainting: brush strokes, boxes, mask files. A mask is 1 in the hole, whose pixels are to be filled, and 0 elsewhere."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from .data import SizedDataset
from .images import ReadOptions, is_image, read_layer
from .keyed import split_key

logger = logging.getLogger(__name__)

# A mask whose hole covers more of the picture than this share is probably inverted.
MOST_HOLE = 0.95

# (generator, height, width) -> hole [height, width] bool.
DrawHole = Callable[[np.random.Generator, int, int], np.ndarray]


class FreeForm:
    """Free-form holes as a user would brush them (Yu et al., "Free-form image inpainting with gated convolution", 2018).

    A hole is one to three zigzag strokes of 4 to 11 turns, round at every vertex. The average step is an eighth of the diagonal long, at
    about 72 degrees; every other step turns back. The constants are those of the public code. Holes are also mirrored at random, which has
    no effect in the public code.

    Args:
        width: least and largest width of a stroke in pixels; the default is for images of 256 pixels.
        strokes: least and largest number of strokes.
        turns: least and largest number of turns of a stroke.

    Raises:
        ValueError: a range is empty or does not start at 1 or more.
    """

    def __init__(self, width: tuple[int, int] = (12, 40), strokes: tuple[int, int] = (1, 3), turns: tuple[int, int] = (4, 11)) -> None:
        for name, limits in (("width", width), ("strokes", strokes), ("turns", turns)):
            if not isinstance(limits, Sequence) or len(limits) != 2 or not 1 <= limits[0] <= limits[1]:
                raise ValueError(f"{name} must be (least, largest) with 1 <= least <= largest, got {limits}")
        self.width, self.strokes, self.turns = tuple(width), tuple(strokes), tuple(turns)

    def __call__(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """Draw a hole for an image of `height` x `width` pixels -> [height, width] bool, of at least one pixel."""
        mean, spread = 2 * math.pi / 5, 2 * math.pi / 15
        radius = math.hypot(height, width) / 8
        canvas = Image.new("1", (width, height))
        draw = ImageDraw.Draw(canvas)
        for _ in range(rng.integers(self.strokes[0], self.strokes[1] + 1)):
            low, high = mean - rng.uniform(0, spread), mean + rng.uniform(0, spread)
            x, y = int(rng.integers(width)), int(rng.integers(height))
            vertices = [(x, y)]
            for turn in range(rng.integers(self.turns[0], self.turns[1] + 1)):
                angle = rng.uniform(low, high)
                angle = angle if turn % 2 else 2 * math.pi - angle
                step = min(max(rng.normal(radius, radius // 2), 0), 2 * radius)
                x = int(min(max(x + step * math.cos(angle), 0), width))
                y = int(min(max(y + step * math.sin(angle), 0), height))
                vertices.append((x, y))
            brush = int(rng.uniform(*self.width))
            draw.line(vertices, fill=1, width=brush)
            for x, y in vertices:
                draw.ellipse((x - brush // 2, y - brush // 2, x + brush // 2, y + brush // 2), fill=1)
        hole = np.array(canvas)
        for axis in (0, 1):
            hole = np.flip(hole, axis) if rng.random() < 0.5 else hole
        return hole


class Box:
    """A rectangular hole at a random place.

    Args:
        side: least and largest side of the hole, as fractions of the image's.

    Raises:
        ValueError: `side` is not (least, largest) with 0 < least <= largest <= 1.
    """

    def __init__(self, side: tuple[float, float] = (0.25, 0.5)) -> None:
        if not isinstance(side, Sequence) or len(side) != 2 or not 0 < side[0] <= side[1] <= 1:
            raise ValueError(f"side must be (least, largest) with 0 < least <= largest <= 1, got {side}")
        self.side = tuple(side)

    def __call__(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """Draw a hole for an image of `height` x `width` pixels -> [height, width] bool, of at least one pixel."""
        hole = np.zeros((height, width), bool)
        (top, h), (left, w) = (self._span(rng, length) for length in hole.shape)
        hole[top : top + h, left : left + w] = True
        return hole

    def _span(self, rng: np.random.Generator, length: int) -> tuple[int, int]:
        size = max(1, round(rng.uniform(self.side[0], self.side[1]) * length))
        return int(rng.integers(length - size + 1)), size


class MaskFiles:
    """Holes from the mask images of a folder, a random one for each image, resized to it by nearest neighbour.

    Args:
        folder: the folder.
        invert, threshold, ignore_orientation, allow_huge: see `read_mask`.

    Raises:
        FileNotFoundError: the folder is missing or holds no image.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        invert: bool = False,
        threshold: int | None = None,
        ignore_orientation: bool = False,
        allow_huge: bool = False,
    ) -> None:
        self.options: Any = {"invert": invert, "threshold": threshold}
        self.options |= {"ignore_orientation": ignore_orientation, "allow_huge": allow_huge}
        folder = Path(folder)
        self.paths = sorted(path for path in folder.iterdir() if is_image(path)) if folder.is_dir() else []
        if not self.paths:
            raise FileNotFoundError(f"mask folder {folder} is missing or holds no image")

    def __call__(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """Draw a hole for an image of `height` x `width` pixels -> [height, width] bool."""
        path = self.paths[rng.integers(len(self.paths))]
        hole = np.asarray(Image.fromarray(read_mask(path, **self.options)).resize((width, height), Image.Resampling.NEAREST))
        if not hole.any():
            raise ValueError(f"mask {path} has no hole left at {height} x {width} pixels")
        return hole


def read_mask(path: str | Path, *, invert: bool = False, threshold: int | None = None, **reading: Unpack[ReadOptions]) -> np.ndarray:
    """Read a mask image -> [H, W] bool: white (255) is the hole, black (0) is known.

    In a layer, an image that is transparent except for strokes of one colour other than black, the strokes are the hole.

    Args:
        path: the file.
        invert: whether black, or the part of a layer that is not painted, is the hole.
        threshold: the least grey value, or opacity of a layer, in 1..255, that counts as white; None allows only black and white.
        reading: see `carafepp.tasks.images.ReadOptions`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, holds other values than black and white, has transparent pixels and is not a layer, or has no
            hole.
    """
    if threshold is not None and not (isinstance(threshold, int) and 1 <= threshold <= 255):
        raise ValueError(f"threshold must be a whole number in 1..255, got {threshold!r}")
    pixels = np.asarray(read_layer(path, "mask", **reading))  # [H, W, 4]
    colors, opacity = pixels[..., :3], pixels[..., 3]
    if opacity.min(initial=255) == 255:
        values = _read_grey(colors, path, threshold)
    else:
        painted = colors[opacity > 0]
        if painted.size and (painted != painted[0]).any():
            raise ValueError(f"mask {path} has transparent pixels and strokes of several colours: paint in white alone")
        if painted.size and not painted.any():
            raise ValueError(f"mask {path} has transparent and black pixels, either may be the hole: paint it white")
        values = opacity
    least = 255 if threshold is None else threshold
    odd = values[(values > 0) & (values < 255)]
    if threshold is None and odd.size:
        raise ValueError(
            f"mask {path} must contain only black (known) and white (hole), got {odd.size} values between, such as {odd[0]}: "
            f"give a threshold, or save it as PNG with hard edges, because JPEG blurs edges"
        )
    hole = (values >= least) != invert
    if not hole.any():
        raise ValueError(f"mask {path} has no hole: paint the pixels to fill white (255) and the others black (0)")
    if hole.mean() > MOST_HOLE:
        _warn_of_hole(str(path), float(hole.mean()))
    return hole


def _read_grey(colors: np.ndarray, path: str | Path, threshold: int | None) -> np.ndarray:
    """Return the grey values of an opaque mask [H, W, 3] -> [H, W]."""
    if (colors == colors[..., :1]).all():
        return colors[..., 0]
    odd = colors[(colors > 0) & (colors < 255)]
    if threshold is None and odd.size == 0:
        raise ValueError(f"mask {path} must contain only black (known) and white (hole), got colours")
    return np.asarray(Image.fromarray(colors).convert("L"))


# one warning for each file, even if it is read several times
@functools.cache
def _warn_of_hole(path: str, part: float) -> None:
    logger.warning("mask %s: %.1f %% of the picture is hole; if black is meant to be the hole, invert the mask", path, 100 * part)


class Masked(Dataset):
    """Images with holes: item (image [3, H, W], mask [1, H, W] of the image's dtype, 1 in the hole).

    A hole is a function of (seed, epoch, index) alone. `data[epoch, index]` gives a new hole in every epoch, for training. `data[index]`
    gives the hole of epoch 0, for validation.

    Args:
        images: items [3, H, W] by index or (epoch, index).
        masks: draws a hole [H, W] bool from (generator, height, width).
        seed: fixes the holes.
    """

    def __init__(self, images: SizedDataset, masks: DrawHole, seed: int = 0) -> None:
        self.images, self.masks, self.seed = images, masks, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        image = self.images[key]
        rng = np.random.default_rng((self.seed, *split_key(key, len(self))))
        hole = np.ascontiguousarray(self.masks(rng, *image.shape[1:]))
        return image, torch.from_numpy(hole)[None].to(image.dtype)
