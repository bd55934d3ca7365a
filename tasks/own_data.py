"""Your own data in a folder: what its files say about the configuration of a training, such as the classes."""

from pathlib import Path
from typing import Any

from .coco_check import read_annotations

# the names under which programs export the two parts of a data set
PARTS = {"train": ("train", "train2017", "training"), "val": ("val", "val2017", "valid", "validation")}

COCO_LAYOUTS = (
    "train.json and val.json beside the folders train/ and val/ with the images, "
    "annotations/train.json or annotations/instances_train.json, or train/_annotations.coco.json"
)


def describe_coco(root: str | Path) -> dict[str, Any]:
    """Find the annotations and images of a folder in COCO's format, and read the names of the classes.

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
        annotations = find_annotations(root, part)
        content = read_annotations(annotations)
        found[part] = {"annotations": str(annotations), "images": str(find_image_folder(root, part, annotations, content))}
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
        f"data.{part}.annotations=FILE data.{part}.images=FOLDER with setting=detection_paper takes any place"
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
    raise FileNotFoundError(
        f"the first image of {annotations}, {first}, is in none of the folders {', '.join(str(f.relative_to(root)) for f in folders)} of "
        f"data.root={root}"
    )
