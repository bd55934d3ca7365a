"""Scenes as files in the layouts of COCO 2017, ADE20K, ImageNet and Places365, for any reader of these data sets."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .scenes import CLASSES, Scene, Scenes

# The file that says which scenes a folder holds.
MARKER = "scenes.json"

JPEG_QUALITY = 95


def write_scenes(
    layout: str,
    out: str | Path,
    *,
    train: int,
    val: int,
    size: int | tuple[int, int],
    seed: int = 0,
    objects: tuple[int, int] = (1, 3),
) -> None:
    """Write `train` training scenes and `val` validation scenes to the folder `out`; item i of a split is `Scenes(...)[i]`.

    Every file appears only when it is complete. A second call with the same arguments writes the files that are missing.

    Args:
        layout: a key of LAYOUTS.
        out: a new or empty folder, or one that an earlier call with the same arguments wrote.
        train, val: the number of scenes of each split.
        size, seed, objects: see `Scenes`.

    Raises:
        ValueError: the layout is unknown, an argument is out of the domain of `Scenes`, or the folder holds other scenes.
        FileExistsError: the folder holds anything else.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    write, view = LAYOUTS[layout]
    splits = [Scenes(split, length, size, seed, objects, view) for split, length in (("train", train), ("val", val))]
    arguments = {"train": train, "val": val, "size": splits[0].size, "seed": seed, "objects": splits[0].objects}
    out = Path(out)
    _claim(out, {"layout": layout, **arguments})
    for scenes in splits:
        write(out, scenes)


def _claim(out: Path, arguments: dict) -> None:
    """Mark the folder as a folder of scenes, or check that it holds scenes of the same arguments."""
    arguments = json.loads(json.dumps(arguments))
    if (out / MARKER).exists():
        found = _read_marker(out / MARKER)
        if different := [f"{key}={found.get(key)}, not {value}" for key, value in arguments.items() if found.get(key) != value]:
            raise ValueError(f"{out} holds other scenes ({'; '.join(different)}): give another folder, or delete this one")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and holds no scenes: give a new or an empty folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / MARKER, lambda path: path.write_text(json.dumps(arguments, indent=2) + "\n"))


def _read_marker(path: Path) -> dict:
    """Read the arguments of the scenes that a folder holds."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not say which scenes its folder holds ({error}): give another folder, or delete this one") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not say which scenes its folder holds: give another folder, or delete this one")
    return found


def _write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a file that does not exist yet; the file gets its name when it is complete."""
    if not path.exists():
        part = path.with_name(f".{path.name}.part")
        save(part)
        os.replace(part, path)


def _write_jpeg(path: Path, scene: Scene) -> None:
    pixels = np.ascontiguousarray((scene.image * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
    _write(path, lambda part: Image.fromarray(pixels).save(part, "JPEG", quality=JPEG_QUALITY, subsampling=0))


def _each(scenes: Scenes) -> Iterator[Scene]:
    """Yield the scenes of epoch 0, with a progress bar."""
    return (scenes.scene(index) for index in tqdm(range(len(scenes)), scenes.split, unit="scene"))


def _folder(*parts: str | Path) -> Path:
    folder = Path(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_lengths(mask: np.ndarray) -> dict:
    """Encode a mask [H, W] bool as uncompressed run lengths of COCO: lengths of alternating runs in column order, zeros first."""
    flat = np.concatenate(([False], mask.ravel(order="F")))
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), mask.size)
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


def write_coco(out: Path, scenes: Scenes) -> None:
    """Write JPEGs to train2017/ or val2017/, and masks as run lengths to annotations/instances_*2017.json; category 1..10 is digit 0..9."""
    name = f"{scenes.split}2017"
    pictures, images, annotations = _folder(out, name), [], []
    for scene in _each(scenes):
        # image ids start at 1, because some programs treat 0 as "none"
        image_id = scene.index + 1
        file_name = f"{image_id:012d}.jpg"
        _write_jpeg(pictures / file_name, scene)
        height, width = scene.owner.shape
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for label, mask, box in zip(scene.labels.tolist(), scene.masks, scene.boxes.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": int(mask.sum()),
                    "segmentation": run_lengths(mask),
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": "Scanned digits on photographs", "version": "1.0"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label, "name": name, "supercategory": "digit"} for label, name in enumerate(CLASSES) if label],
    }
    _write(_folder(out, "annotations") / f"instances_{name}.json", lambda path: path.write_text(json.dumps(content)))


def write_ade20k(out: Path, scenes: Scenes) -> None:
    """Write JPEGs to images/, 8-bit PNGs to annotations/, each in training/ or validation/, and the classes to objectInfo150.txt.

    In the PNGs 0 means unlabelled, as in ADE20K; the classes of the scenes, background included, are 1..11.
    """
    folder = {"train": "training", "val": "validation"}[scenes.split]
    images, annotations = _folder(out, "images", folder), _folder(out, "annotations", folder)
    for scene in _each(scenes):
        name = f"ADE_{scenes.split}_{scene.index + 1:08d}"
        _write_jpeg(images / f"{name}.jpg", scene)
        labels = Image.fromarray((scene.semantic + 1).astype(np.uint8))
        _write(annotations / f"{name}.png", lambda path, labels=labels: labels.save(path, "PNG"))
    rows = ["Idx\tName", *(f"{label + 1}\t{name}" for label, name in enumerate(CLASSES))]
    _write(out / "objectInfo150.txt", lambda path: path.write_text("\n".join(rows) + "\n"))


def write_imagenet(out: Path, scenes: Scenes) -> None:
    """Write JPEGs to train/ or val/, with a folder for each dominant digit, as torchvision's ImageFolder reads them."""
    folders = [_folder(out, scenes.split, name) for name in CLASSES[1:]]
    for scene in _each(scenes):
        _write_jpeg(folders[scene.labels[0] - 1] / f"{scenes.split}_{scene.index + 1:08d}.JPEG", scene)


def write_places365(out: Path, scenes: Scenes) -> None:
    """Write crops of photographs, without digits, to train/ or val/."""
    folder = _folder(out, scenes.split)
    for scene in _each(scenes):
        _write_jpeg(folder / f"{scene.index + 1:08d}.jpg", scene)


# The writer of each layout, and the view of `Scenes` that has its items.
LAYOUTS = {
    "coco": (write_coco, "detection"),
    "ade20k": (write_ade20k, "segmentation"),
    "imagenet": (write_imagenet, "classification"),
    "places365": (write_places365, "photograph"),
}
