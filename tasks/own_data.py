"""Your own data in a folder: what its files say about the configuration of a training, such as the classes."""

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import ade20k
from .coco_check import read_annotations
from .imagenet import find_classes
from .label_maps import IGNORED, find_labels, list_images

# the name in labelmap.txt of pixels to ignore
VOID = "void"

logger = logging.getLogger(__name__)

# the names under which programs export the two parts of a data set
PARTS = {"train": ("train", "train2017", "training"), "val": ("val", "val2017", "valid", "validation")}

COCO_LAYOUTS = (
    "train.json and val.json beside the folders train/ and val/ with the images, "
    "annotations/train.json or annotations/instances_train.json, or train/_annotations.coco.json; or one JSON file "
    "for both parts"
)


def describe_coco(
    root: str | Path,
    annotations: Mapping[str, str | None] | None = None,
    images: Mapping[str, str | None] | None = None,
    val_share: float = 0.2,
) -> dict[str, Any]:
    """Find the annotations and images of a folder in COCO's format, and read the names of the classes.

    Args:
        root: the folder.
        annotations, images: the annotation file and the folder of images of the parts "train" and "val"; what is None is searched for.
        val_share: the fraction of the images that the validation part gets if the folder has a single annotation file. A warning says so.

    Returns:
        Values of the configuration of `carafepp-train` (`conf/setting/detection_own.yaml`): the classes in the order of their ids, the
        annotation files and the folders of images, and the share of a file that both parts have in common.

    Raises:
        FileNotFoundError: there is no folder, no annotation file of a part, or no folder with its images.
        ValueError: an annotation file cannot be read, or `val_share` leaves a part without images.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder")
    found, names = {}, []
    single = None if any((annotations or {}).values()) else find_single_annotations(root)
    if single:
        check_val_share(val_share, single)
    for part in PARTS:
        file = single or Path((annotations or {}).get(part) or find_annotations(root, part))
        content = read_annotations(file)
        folder = (images or {}).get(part) or find_image_folder(root, "train" if single else part, file, content)
        found[part] = {"annotations": str(file), "images": str(folder)}
        if single:
            found[part]["share"] = [0, 1 - val_share] if part == "train" else [1 - val_share, 1]
        if part == "train":
            names = [str(category.get("name")) for category in sorted(content["categories"], key=lambda category: category["id"])]
    return {"class_names": names, "data": found}


def find_single_annotations(root: Path) -> Path | None:
    """Return the JSON file of a folder that has only one, unless it is that of a validation part."""
    files = [path for path in root.rglob("*.json") if not any(name.startswith(".") for name in path.relative_to(root).parts)]
    return files[0] if len(files) == 1 and files[0] not in list_annotation_files(root, "val") else None


def list_annotation_files(root: Path, part: str) -> list[Path]:
    """List the files in which the annotations of a part may be."""
    patterns = ("{}.json", "annotations/{}.json", "annotations/instances_{}.json", "{}/_annotations.coco.json")
    return [root / pattern.format(name) for name in PARTS[part] for pattern in patterns]


def check_val_share(val_share: float, file: Path) -> None:
    """Check that both parts of an annotation file have images, and warn that the file is divided.

    Raises:
        ValueError: a part would have none.
    """
    count = len(read_annotations(file)["images"])
    if not 1 <= int((1 - val_share) * count + 1e-6) < count:
        raise ValueError(f"own_data.val_share={val_share} leaves a part of the {count} images of {file} empty")
    logger.warning(
        "%s is the only annotation file: a part of its images, own_data.val_share=%s, is the validation set, and the others are the "
        "training set. Images of one scene may lie in both parts, which makes scores too good; separate files avoid this",
        file,
        val_share,
    )


def find_annotations(root: Path, part: str) -> Path:
    """Find the annotation file of the training or validation part.

    Raises:
        FileNotFoundError: the part has no annotation file.
    """
    for file in list_annotation_files(root, part):
        if file.is_file():
            return file
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
    names = [*PARTS[part], "default"]
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

    With labelmap.txt, maps hold colours instead of labels, as RGB or indexed PNG, and the file has the name and the colour of each class
    (`read_color_table`); pixels of the class `void` are ignored.

    Returns:
        Values of the configuration of `carafepp-train` (`conf/setting/segmentation_own.yaml`): the names of the classes, the folders of
        images and maps, the class of each label, and the colours of the labels, if maps hold colours.

    Raises:
        FileNotFoundError: a folder or a map is missing.
        ValueError: a map cannot be read, classes.txt does not name all classes, or labelmap.txt has a line of another form.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder")
    found: dict[str, dict[str, Any]] = {}
    for part, names in PARTS.items():
        images = find_folder(root, part, [pattern for name in names for pattern in (f"images/{name}", f"{name}/images")])
        kinds = ("annotations", "masks", "labels")
        maps = find_folder(root, part, [pattern for name in names for kind in kinds for pattern in (f"{kind}/{name}", f"{name}/{kind}")])
        found[part] = {"images": str(images), "annotations": str(maps)}
    if (file := root / "labelmap.txt").is_file():
        table = read_color_table(file)
        names = [name for name in table if name != VOID]
        labels = {number: names.index(name) if name in names else IGNORED for number, name in enumerate(table)}
        more = {"labels": labels, "palette": list(table.values())}
    else:
        names, labels = read_classes(root, [(Path(part["images"]), Path(part["annotations"])) for part in found.values()])
        more = {"labels": labels}
    return {"class_names": names, "data": {part: folders | copy.deepcopy(more) for part, folders in found.items()}}


def read_classes(root: Path, folders: Sequence[tuple[Path, Path]]) -> tuple[list[str], dict[int, int]]:
    """Read the names of the classes, and the class of each label, from folders of images and maps (see `describe_label_maps`).

    The first folders are those of the training part. A label that only other maps have is a class, and a warning names it.

    Raises:
        FileNotFoundError: a map is missing.
        ValueError: a map cannot be read, there are fewer than two labels or none in a part, or classes.txt does not name all classes.
    """
    parts = [find_labels(maps / f"{path.stem}.png" for path in list_images(images)) for images, maps in folders]
    values = set.union(*map(set, parts))
    ignored, labels = {IGNORED}, sorted(values if values <= {0, IGNORED} else values - {IGNORED})
    if len(labels) < 2:
        raise ValueError(f"the label maps of {root} must hold two labels or more, besides {IGNORED} for pixels to ignore, got {labels}")
    for (_, maps), found in zip(folders, parts, strict=True):
        if not found.intersection(labels):
            raise ValueError(f"the label maps in {maps} hold only {IGNORED}, for pixels to ignore")
    if untrained := [str(label) for label in labels if label not in parts[0]]:
        logger.warning("no training map in %s has the labels %s, which other maps have", folders[0][1], ", ".join(untrained))
    names = [str(label) for label in labels]
    if (root / "objectInfo150.txt").is_file():
        names, ignored = ade20k.class_names(root), {0, IGNORED}
        labels = list(range(1, 1 + len(names)))
    elif (file := root / "classes.txt").is_file():
        names = [name.strip() for name in file.read_text(encoding="utf-8").split("\n") if name.strip()]
        if labels[-1] < len(names):
            labels = list(range(len(names)))
        elif len(labels) != len(names):
            raise ValueError(f"{file} must name the classes of labels {', '.join(map(str, labels))}, got {len(names)} names")
        if len({*names}) < len(names):
            raise ValueError(f"{file} must name each class once, got {max(names, key=names.count)} {max(map(names.count, names))} times")
    return names, dict.fromkeys(ignored, IGNORED) | {label: number for number, label in enumerate(labels)}


def read_color_table(file: Path) -> dict[str, list[int]]:
    """Read the names of classes with their colours, from lines such as `road:128,64,128`.

    Lines that start with # and everything after a further colon are ignored, as in the labelmap.txt that CVAT exports.

    Raises:
        ValueError: a line has another form, or there are fewer than two classes; the message names the file and the line.
    """
    table: dict[str, list[int]] = {}
    for line in file.read_text(encoding="utf-8").split("\n"):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.strip().partition(":")
        channels = [channel.strip() for channel in rest.partition(":")[0].split(",")]
        if not name or name in table or len(channels) != 3 or not all(channel.isdecimal() and int(channel) < 256 for channel in channels):
            raise ValueError(f"{file} must have one line NAME:RED,GREEN,BLUE for each class, with colours in 0..255, got {line.strip()!r}")
        table[name] = [int(channel) for channel in channels]
    if len(table.keys() - {VOID}) < 2:
        raise ValueError(f"{file} must name two classes or more, got {', '.join(table) or 'none'}")
    return table


def find_folder(root: Path, part: str, names: list[str]) -> Path:
    """Return the first folder below `root` that exists.

    Raises:
        FileNotFoundError: none of the folders exists.
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
        ValueError: there is a single class.
    """
    if not (Path(root) / "train").is_dir():
        raise FileNotFoundError(f"data.root={root} should hold train/ and val/, each with a folder for each class")
    names = find_classes(Path(root) / "train")
    if len(names) < 2:
        raise ValueError(f"{Path(root) / 'train'} must hold folders of two classes or more, got {names[0]}")
    return {"num_classes": len(names), "task": {"class_names": names}}
