"""Your own data in a folder: what its files say about the configuration of a training, such as the classes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import ade20k
from .coco_check import read_annotations
from .imagenet import find_classes
from .label_maps import IGNORED, find_labels, list_images

# the names under which programs export the two parts of a data set
PARTS = {"train": ("train", "train2017", "training"), "val": ("val", "val2017", "valid", "validation")}

COCO_LAYOUTS = (
    "train.json and val.json beside the folders train/ and val/ with the images, "
    "annotations/train.json or annotations/instances_train.json, or train/_annotations.coco.json"
)


def describe_coco(
    root: str | Path, annotations: Mapping[str, str | None] | None = None, images: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Find the annotations and images of a folder in COCO's format, and read the names of the classes.

    Args:
        root: the folder.
        annotations, images: the annotation file and the folder of images of the parts "train" and "val"; what is None is searched for.

    Returns:
        Values of the configuration of `carafepp-train` (`conf/setting/detection_own.yaml`): the classes in the order of their ids, the
        annotation files and the folders of images.

    Raises:
        FileNotFoundError: there is no folder, no annotation file of a part, or no folder with its images.
        ValueError: an annotation file cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder")
    found, names = {}, []
    for part in PARTS:
        file = Path((annotations or {}).get(part) or find_annotations(root, part))
        content = read_annotations(file)
        folder = (images or {}).get(part) or find_image_folder(root, part, file, content)
        found[part] = {"annotations": str(file), "images": str(folder)}
        if part == "train":
            names = [str(category.get("name")) for category in sorted(content["categories"], key=lambda category: category["id"])]
    return {"class_names": names, "data": found}


def find_annotations(root: Path, part: str) -> Path:
    """Find the annotation file of the training or validation part.

    Raises:
        FileNotFoundError: there is none.
    """
    for name in PARTS[part]:
        files = (f"{name}.json", f"annotations/{name}.json", f"annotations/instances_{name}.json", f"{name}/_annotations.coco.json")
        for file in files:
            if (root / file).is_file():
                return root / file
    found = ", ".join(sorted(str(path.relative_to(root)) for path in root.rglob("*.json"))[:5]) or "none"
    raise FileNotFoundError(
        f"data.root={root} has no annotations of the {part} part; it should hold {COCO_LAYOUTS}. JSON files in the folder: {found}; "
        f"data.{part}.annotations=FILE data.{part}.images=FOLDER takes any place"
    )


def find_image_folder(root: Path, part: str, annotations: Path, content: dict) -> Path:
    """Find the folder that holds the first image that the annotations name.

    Raises:
        FileNotFoundError: no folder holds it.
    """
    first = str(content["images"][0].get("file_name"))
    names = PARTS[part]
    folders = [annotations.parent, *(root / name for name in names), *(root / "images" / name for name in names), root / "images", root]
    for folder in folders:
        if (folder / first).is_file():
            return folder
    searched = ", ".join(dict.fromkeys(os.path.relpath(folder, root) for folder in folders))
    raise FileNotFoundError(
        f"the first image of {annotations}, {first}, is in none of the folders {searched} of data.root={root}: "
        f"give data.{part}.images=FOLDER"
    )


def describe_label_maps(root: str | Path) -> dict[str, Any]:
    """Find the images and label maps of a folder, and read the classes from the maps.

    Every label that occurs is a class, in ascending order, and 255 is ignored; in maps of 0 and 255 alone, 255 is a class as well. The
    lines of classes.txt, if the folder has this file, name the classes: those of labels 0, 1, ..., or, if there are as many lines as
    labels, those of the labels in ascending order. With objectInfo150.txt, as in ADE20K, label 0 is ignored, and the names of that file are
    those of labels 1, 2, ...

    Returns:
        Values of the configuration of `carafepp-train` (`conf/setting/segmentation_own.yaml`): the names of the classes, the folders of
        images and maps, and the class of each label.

    Raises:
        FileNotFoundError: a folder or a map is missing.
        ValueError: a map cannot be read, or classes.txt does not name all classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder")
    found, values = {}, set()
    for part, names in PARTS.items():
        images = find_folder(root, part, [pattern for name in names for pattern in (f"images/{name}", f"{name}/images")])
        kinds = ("annotations", "masks", "labels")
        maps = find_folder(root, part, [pattern for name in names for kind in kinds for pattern in (f"{kind}/{name}", f"{name}/{kind}")])
        values |= find_labels(maps / f"{path.stem}.png" for path in list_images(images))
        found[part] = {"images": str(images), "annotations": str(maps)}
    ignored, labels = {IGNORED}, sorted(values if values <= {0, IGNORED} else values - {IGNORED})
    names = [str(label) for label in labels]
    if (root / "objectInfo150.txt").is_file():
        names, ignored = ade20k.class_names(root), {0, IGNORED}
        labels = list(range(1, 1 + len(names)))
    elif (file := root / "classes.txt").is_file():
        names = file.read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
        if labels[-1] < len(names):
            labels = list(range(len(names)))
        elif len(labels) != len(names):
            raise ValueError(f"{file} must name the classes of labels {', '.join(map(str, labels))}, got {len(names)} names")
    classes = dict.fromkeys(ignored, IGNORED) | {label: number for number, label in enumerate(labels)}
    for part in found.values():
        part["labels"] = dict(classes)
    return {"class_names": names, "data": found}


def find_folder(root: Path, part: str, names: list[str]) -> Path:
    """Return the first folder below `root` that exists.

    Raises:
        FileNotFoundError: none exists.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"data.root={root} has none of the folders {', '.join(names)} for its {part} part")


def describe_class_folders(root: str | Path) -> dict[str, Any]:
    """Read the classes of train/ below a folder, which holds a folder of images for each class.

    Returns:
        Values of the configuration of `carafepp-train` (`conf/setting/classification_own.yaml`): number and names of the classes.

    Raises:
        FileNotFoundError: there is no folder train/, or none of a class in it.
    """
    if not (Path(root) / "train").is_dir():
        raise FileNotFoundError(f"data.root={root} should hold train/ and val/, each with a folder for each class")
    names = find_classes(Path(root) / "train")
    return {"num_classes": len(names), "task": {"class_names": names}}
