"""Small data sets in COCO's format with what the public ones contain: JPEGs, polygons, run lengths, crowds, empty images, ids with gaps."""

import json
from pathlib import Path

import numpy as np
from carafepp.tasks.layouts import run_lengths
from PIL import Image
from pycocotools import mask as rle

CATEGORIES = [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}]
NAMES = ["car", "cat", "brush"]
# width, height
SIZES = {139: (80, 60), 285: (60, 80), 632: (72, 64), 724: (64, 64)}


def disc(size: tuple[int, int], x: float, y: float, radius: float) -> np.ndarray:
    """Return the mask [H, W] of a disc."""
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def content() -> dict:
    """Return an annotation file: 139 has polygons, 285 run lengths of both kinds and a crowd, 632 a crowd alone, 724 nothing."""
    compressed = rle.encode(np.asfortranarray(disc(SIZES[285], 30, 40, 12).astype(np.uint8)))
    crowd = run_lengths(disc(SIZES[285], 15, 15, 10))
    rows = [
        (7001, 139, 3, [10.5, 8.25, 30.0, 20.5], [[10.5, 8.25, 40.5, 8.25, 40.5, 28.75, 10.5, 28.75]], 615.0, 0),
        (7003, 139, 90, [45.0, 20.0, 20.0, 30.0], [[45, 20, 65, 20, 55, 50], [45, 40, 50, 40, 50, 50, 45, 50]], 350.0, 0),
        (812, 285, 17, [18.0, 28.0, 25.0, 25.0], {"size": [80, 60], "counts": compressed["counts"].decode()}, 441.0, 0),
        (813, 285, 3, [40.0, 50.0, 11.0, 11.0], run_lengths(disc(SIZES[285], 45, 55, 5)), 81.0, 0),
        (900100, 285, 3, [5.0, 5.0, 21.0, 21.0], crowd, 317.0, 1),
        (900200, 632, 17, [10.0, 10.0, 31.0, 31.0], run_lengths(disc(SIZES[632], 25, 25, 15)), 709.0, 1),
    ]
    names = ("id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd")
    return {
        "info": {},
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": w, "height": h} for i, (w, h) in SIZES.items()],
        "annotations": [dict(zip(names, row, strict=True)) for row in rows],
        "categories": CATEGORIES,
    }


def write(root: Path, made: dict | None = None) -> Path:
    """Write train2017/, val2017/ and annotations/ with `made`, or `content()`, in both."""
    made = made or content()
    noise = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        for image_id, (width, height) in SIZES.items():
            Image.fromarray(noise.integers(0, 255, (height, width, 3), np.uint8)).save(root / split / f"{image_id:012d}.jpg")
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(made))
    return root
