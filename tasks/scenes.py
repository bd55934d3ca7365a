"""Scenes: scanned digits, or cut-outs, on crops of photographs, with exact masks, boxes, classes and semantic maps; nothing is downloaded.

A scene contains one large digit, the *dominant* one, and optionally smaller digits on top of it and of each other. Each digit is a real
scan, slanted, stretched, rotated by at most 20 degrees (so that 6 and 9 remain distinct), and coloured to differ in luminance from its
surroundings. Training and validation share no scan, no photograph and nearly no writer.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .cutouts import Cutouts, load_cutouts, paint_cutout, place_cutout
from .keyed import split_key
from .photographs import load_digit_scans, load_photographs
from .splits import SPLITS, check_split

# Class names of the semantic map; instances have labels 1..10, classification counts the digits from 0.
CLASSES = ("background", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9")

# Mean and standard deviation per channel of the training scenes.
MEAN = (0.46, 0.41, 0.39)
STD = (0.28, 0.25, 0.26)

# Least and largest height of the dominant digit and of the others, as fractions of the image's shorter side.
DOMINANT_HEIGHT = (0.55, 0.8)
HEIGHT = (0.3, 0.5)

# At least this fraction of the pixels of every digit stays visible.
LEAST_VISIBLE = 0.7

# The luminance of a digit differs from the mean luminance under and around it by at least this much.
LEAST_CONTRAST = 0.4

LUMINANCE = np.array((0.299, 0.587, 0.114))

# Ink of at least this value (of 255) belongs to the digit.
INK = 118

SMALLEST_SIDE = 16


class Scene(NamedTuple):
    """A scene; `labels[0]` is the dominant digit, and every instance has at least one visible pixel."""

    image: np.ndarray  # [3, H, W] float32 in 0..1
    owner: np.ndarray  # [H, W] uint8, 0 where no digit is on top, else 1 + the instance's position in labels
    labels: np.ndarray  # [instances] int64 in 1..10, the digit plus one
    index: int

    @property
    def semantic(self) -> np.ndarray:
        """Return the class of every pixel, [H, W] int64: 0 background, 1..10 digits."""
        return np.concatenate(([0], self.labels))[self.owner]

    @property
    def masks(self) -> np.ndarray:
        """Return the visible part of every instance, [instances, H, W] bool; the parts are disjoint."""
        return self.owner == np.arange(1, len(self.labels) + 1, dtype=np.uint8)[:, None, None]

    @property
    def boxes(self) -> np.ndarray:
        """Return the tight box of every visible part, [instances, 4] float32: x1, y1, x2, y2 in pixels, the last two exclusive."""
        boxes = np.empty((len(self.labels), 4), np.float32)
        for box, mask in zip(boxes, self.masks, strict=True):
            xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            box[:] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
        return boxes


def compose(
    split: str, size: tuple[int, int], key: tuple[int, int, int], objects: tuple[int, int], cutouts: Cutouts | None = None
) -> Scene:
    """Generate the scene of `key` (seed, epoch, index).

    An object is omitted if it would hide too much of the others at every place that is tried. Crowded scenes can therefore contain fewer
    objects.

    Args:
        split: "train" or "val".
        size: (height, width) in pixels.
        objects: least and largest number of objects.
        cutouts: the images of each class that replace the scanned digits.
    """
    rng = np.random.default_rng((SPLITS.index(split), *key))
    image = _background(rng, load_photographs(split), *size)
    owner = np.zeros(size, np.uint8)
    labels, areas = [], [0]
    for position in range(rng.integers(objects[0], objects[1] + 1)):
        # dominant objects cycle, so that consecutive scenes contain all classes
        sources = load_digit_scans(split) if cutouts is None else cutouts
        category = int(rng.integers(len(sources))) if position else key[-1] % len(sources)
        source = sources[category]
        low, high = HEIGHT if position else DOMINANT_HEIGHT
        height = min(size) * low * (high / low) ** rng.random()
        draw = _ink if cutouts is None else place_cutout
        drawn = draw(rng, source[rng.integers(len(source))], height, size)
        mask = drawn >= INK if cutouts is None else drawn[..., 3] >= 0.5
        area = int(np.count_nonzero(mask))
        place = _free_place(rng, owner, mask, areas)
        if area == 0 or place is None:
            continue
        if cutouts is None:
            _paint(rng, image[:, *place], drawn, height)
        else:
            paint_cutout(image[:, *place], drawn)
        labels.append(category + 1)
        areas.append(area)
        owner[place][mask] = len(labels)
    return Scene(image, owner, np.array(labels, np.int64), key[-1])


def _background(rng: np.random.Generator, images: tuple[Image.Image, ...], height: int, width: int) -> np.ndarray:
    photograph = images[rng.integers(len(images))]
    zoom, left, top, flip, brightness, *tint = rng.random(8)
    scale = (0.35 + 0.65 * zoom) * min(photograph.width / width, photograph.height / height)
    left, top = left * (photograph.width - scale * width), top * (photograph.height - scale * height)
    box = left, top, min(left + scale * width, photograph.width), min(top + scale * height, photograph.height)
    crop = np.asarray(photograph.resize((width, height), Image.Resampling.BILINEAR, box, reducing_gap=1.0))
    crop = crop[:, ::-1] if flip < 0.5 else crop
    gain = (0.75 + 0.35 * brightness) * (0.92 + 0.16 * np.array(tint, np.float32)) / 255
    image = np.multiply(crop.transpose(2, 0, 1), gain[:, None, None], dtype=np.float32, order="C")
    return np.minimum(image, 1, out=image)


def _ink(rng: np.random.Generator, scan: Image.Image, height: float, size: tuple[int, int]) -> np.ndarray:
    """Slant, stretch and rotate a scan -> ink [h, w] uint8, cropped to the digit with a margin, no larger than the image."""
    angle, slant, stretch = rng.uniform((-0.35, -0.15, 0.85), (0.35, 0.15, 1.15))
    cos, sin = math.cos(angle), math.sin(angle)
    # the digit takes 0.8 of the scan's rows; source = step * (slant and stretch) * (rotation) * output
    step = 0.8 * scan.height / height
    side = math.ceil(1.5 * height)
    a, b = step * (cos / stretch + slant * sin), step * (sin / stretch - slant * cos)
    d, e = -step * sin, step * cos
    c, f = (scan.width - (a + b) * side) / 2, (scan.height - (d + e) * side) / 2
    ink = np.asarray(scan.transform((side, side), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR))
    rows, columns = (np.flatnonzero(ink.max(axis) > 20) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return ink[: size[0], : size[1]]


def _free_place(rng: np.random.Generator, owner: np.ndarray, mask: np.ndarray, areas: list[int]) -> tuple[slice, slice] | None:
    """Find a random place for `mask` that leaves LEAST_VISIBLE of every digit's area (`areas`, background first) visible, or None."""
    visible = np.bincount(owner.ravel(), minlength=len(areas))
    least = LEAST_VISIBLE * np.array(areas)
    for _ in range(8):
        y, x = (int(rng.integers(whole - part + 1)) for whole, part in zip(owner.shape, mask.shape, strict=True))
        place = slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1])
        hidden = np.bincount(owner[place][mask], minlength=len(areas))
        if np.all(visible - hidden >= least):
            return place
    return None


def _paint(rng: np.random.Generator, patch: np.ndarray, ink: np.ndarray, height: float) -> None:
    """Paint a digit with a soft halo of the opposite luminance on `patch` [3, h, w], in place."""
    # mean luminance under the digit and around it
    covered = float(LUMINANCE @ patch[:, ink > 0].mean(1))
    up, room, opacity, halo, *chroma = rng.random(7)
    lighter = covered < 0.45 or (covered < 0.55 and up < 0.5)
    span = 1 - covered if lighter else covered
    contrast = LEAST_CONTRAST + room**2 * (span - LEAST_CONTRAST)
    target = covered + contrast if lighter else covered - contrast
    # a random hue of that luminance, as saturated as RGB allows
    chroma = np.array(chroma) - LUMINANCE @ chroma
    limits = np.where(chroma > 0, 1 - target, target) / np.maximum(np.abs(chroma), 1e-6)
    colour = target + chroma * min(limits.min(), 2)

    # the edge is about one pixel wide: one scan pixel, height / 8 pixels wide, is assumed to contain the step from paper to ink
    strength = ink.astype(np.float32)
    coverage = np.clip((strength - INK) * (height / 2040) + 0.5, 0, 1) * np.float32(0.8 + 0.2 * opacity)
    glow = np.minimum(strength, INK) * np.float32(0.5 * halo / INK)
    patch += glow * ((0.0 if lighter else 1.0) - patch)
    patch += coverage * (colour.astype(np.float32)[:, None, None] - patch)
    # rounding can exceed 1
    np.minimum(patch, 1, out=patch)


def classification(scene: Scene) -> tuple[Tensor, int]:
    """Return the image [3, H, W] and the dominant digit, 0..9."""
    return torch.from_numpy(scene.image), int(scene.labels[0]) - 1


def segmentation(scene: Scene) -> tuple[Tensor, Tensor]:
    """Return the image [3, H, W] and the class map [H, W] int64: 0 background, 1..10 digits."""
    return torch.from_numpy(scene.image), torch.from_numpy(scene.semantic)


def detection(scene: Scene) -> tuple[Tensor, dict]:
    """Return the image [3, H, W] and torchvision's target: boxes, labels (1..10), masks, area in pixels, iscrowd, image_id."""
    masks = torch.from_numpy(scene.masks)
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(scene.boxes), format="XYXY", canvas_size=scene.owner.shape),  # pyright: ignore[reportCallIssue]
        "labels": torch.from_numpy(scene.labels),
        "masks": tv_tensors.Mask(masks),
        "area": masks.sum((1, 2), dtype=torch.float32),
        "iscrowd": torch.zeros(len(scene.labels), dtype=torch.int64),
        "image_id": scene.index,
    }
    return torch.from_numpy(scene.image), target


def photograph(scene: Scene) -> Tensor:
    """Return the image [3, H, W] alone, a crop of a photograph without digits."""
    return torch.from_numpy(scene.image)


VIEWS: dict[str, Callable] = {view.__name__: view for view in (classification, segmentation, detection, photograph)}


class Scenes(Dataset):
    """Scenes as a data set for one task.

    Images are float32 [3, H, W] in [0, 1], not normalised (see MEAN, STD). An item depends only on (seed, split, size, objects, epoch,
    index), and not on order, worker or process. `scenes[index]` belongs to epoch 0; `scenes[epoch, index]` gives new scenes in every epoch,
    for training.

    Args:
        split: "train" or "val".
        length: the number of scenes in an epoch.
        size: side, or (height, width), in pixels, each at least 16.
        seed: fixes the scenes.
        objects: least and largest number of digits in a scene.
        view: the form of an item: "classification" (image, digit), "segmentation" (image, class map), "detection" (image, torchvision's
            target with masks), or "photograph" (a crop without digits, for inpainting).
        cutouts: a folder with images with transparency, in a folder for each class, that replace the digits (see
            `carafepp.tasks.cutouts`); None means digits.
        classes: the names of the classes, in the order of their labels; with `cutouts`, those of their folders.

    Raises:
        ValueError: an argument is out of its domain.
        FileNotFoundError: `cutouts` has no folder of a class.
        ModuleNotFoundError: a package with the images is missing.
    """

    def __init__(
        self,
        split: str,
        length: int,
        size: int | tuple[int, int] = 96,
        seed: int = 0,
        objects: tuple[int, int] = (1, 3),
        view: str = "segmentation",
        cutouts: str | None = None,
        classes: Sequence[str] = CLASSES[1:],
    ) -> None:
        check_split(split)
        sides = tuple(size) if isinstance(size, Sequence) else (size, size)
        if len(sides) != 2 or not all(isinstance(side, Integral) and side >= SMALLEST_SIDE for side in sides):
            raise ValueError(f"size must be a side or (height, width) of at least {SMALLEST_SIDE} pixels, got {size}")
        self.size = sides[0], sides[1]
        if view not in VIEWS:
            raise ValueError(f"view must be one of {', '.join(VIEWS)}, got {view!r}")
        given = tuple(objects) if isinstance(objects, Sequence) else (objects,)
        limits = (0, 0) if view == "photograph" else given
        least = 1 if view == "classification" else 0
        if len(limits) != 2 or not all(isinstance(limit, Integral) for limit in limits) or not least <= limits[0] <= limits[1] <= 255:
            raise ValueError(f"objects must be (least, largest) with {least} <= least <= largest <= 255 for {view}, got {objects}")
        self.objects = limits[0], limits[1]
        if not (isinstance(length, Integral) and isinstance(seed, Integral)) or length < 1 or seed < 0:
            raise ValueError(f"length must be at least 1 and seed at least 0, both whole numbers, got length={length}, seed={seed}")
        self.split, self.length, self.seed, self.view = split, length, seed, view
        # loaded here, so that a missing package is reported at once and forked workers share the images
        load_photographs(split)
        self.cutouts = None
        if cutouts is None:
            load_digit_scans(split)
        elif view != "photograph":
            self.cutouts = load_cutouts(cutouts, tuple(map(str, classes)), split)

    @property
    def num_classes(self) -> int:
        """The number of classes in the maps of the segmentation view, and of objects in the others."""
        objects = len(CLASSES) - 1 if self.cutouts is None else len(self.cutouts)
        return objects + (self.view == "segmentation")

    def __len__(self) -> int:
        return self.length

    def scene(self, key: int | tuple[int, int]) -> Scene:
        """Return the whole scene of an item; `key` is index or (epoch, index)."""
        return compose(self.split, self.size, (self.seed, *split_key(key, self.length)), self.objects, self.cutouts)

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        return VIEWS[self.view](self.scene(key))
