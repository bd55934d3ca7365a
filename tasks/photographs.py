"""Real images that pip installs with scikit-learn and scikit-image: photographs and scanned digits, split for training and validation.

Only files inside the two wheels are used; nothing is downloaded. Three photographs are omitted on purpose: `page` and `text` show
writing, which may contain digits without a label; `motorcycle_right` shows `motorcycle_left` from a few centimetres to the side, which
would defeat a split by photograph.

The split is by photograph and not by region of a photograph, because few photographs suffice. A small U-Net (0.4 M parameters), trained on
16,000 scenes of 64 pixels, reached the following mIoUs on 600 scenes each. Unknown photographs do not lower the score, and unknown scans
lower it little:

    digits of      training photographs    validation photographs
    training              0.403                   0.404
    validation            0.380                   0.383
"""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .splits import check_split

# Textures, micrographs and sky are for training; validation has everyday photographs, a night shot, a grey photograph and a texture.
PHOTOGRAPHS = {
    "train": (
        "china.jpg",
        "flower.jpg",
        "astronaut.png",
        "retina.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "hubble_deep_field.jpg",
        "coins.png",
        "moon.png",
        "grass.png",
        "gravel.png",
        "cell.png",
    ),
    "val": ("chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "brick.png"),
}

# Photographs are shrunk to this shorter side, in pixels.
SHORTER_SIDE = 400

# The scans are ordered by writer: nearly all writers of the last scans are unknown to training.
VALIDATION_SCANS = 360

# A scan of 8 x 8 pixels gets a border of one empty pixel and is enlarged by this factor.
ENLARGEMENT = 6


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the embedded images need {name}: pip install '.[demo]' in a checkout", name=name)
    return Path(spec.origin).parent


def photograph_path(name: str) -> Path:
    """Return where an embedded photograph, such as "chelsea.png", is installed.

    Raises:
        ModuleNotFoundError: its package is missing.
        FileNotFoundError: the installed version of the package has no such file.
    """
    in_sklearn = name in ("china.jpg", "flower.jpg")
    path = _package("sklearn") / "datasets" / "images" / name if in_sklearn else _package("skimage") / "data" / name
    if not path.is_file():
        raise FileNotFoundError(f"photograph {path} is missing: pip install --upgrade '.[demo]' in a checkout")
    return path


@functools.cache
def load_photographs(split: str) -> tuple[Image.Image, ...]:
    """Load the photographs of a split, once per process, as RGB images whose shorter side is at most SHORTER_SIDE."""
    check_split(split)
    images = []
    for name in PHOTOGRAPHS[split]:
        with Image.open(photograph_path(name)) as image:
            image = image.convert("RGB")
        scale = min(1, SHORTER_SIDE / min(image.size))
        images.append(image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS))
    return tuple(images)


@functools.cache
def load_digit_scans(split: str) -> tuple[tuple[Image.Image, ...], ...]:
    """Load the scanned digits of a split, once per process: for each of the ten classes grey images of 60 x 60 pixels with ink as 255.

    The last VALIDATION_SCANS of the 1,797 scans of 8 x 8 pixels are the validation split.
    """
    check_split(split)
    _package("sklearn")
    # importing scikit-learn takes a second, and only the scenes need it
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    part = slice(None, -VALIDATION_SCANS) if split == "train" else slice(-VALIDATION_SCANS, None)
    ink = np.pad(data.images[part] * (255 / 16), ((0, 0), (1, 1), (1, 1))).round().astype(np.uint8)
    side = ink.shape[1] * ENLARGEMENT
    classes = [[] for _ in range(10)]
    for scan, digit in zip(ink, data.target[part], strict=True):
        classes[digit].append(Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC))
    return tuple(tuple(scans) for scans in classes)
