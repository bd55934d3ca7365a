"""The checks of COCO annotation files, which report every problem with image id, annotation id and the broken rule."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Unpack

from tqdm import tqdm

from .coco_masks import read_mask, show
from .images import ReadOptions, read_image, suggest_orientation

logger = logging.getLogger(__name__)

# The severity of a problem.
FATAL, UNUSABLE, UNTRAINED, UNMASKED, REPAIRED = "fatal", "unusable", "untrained", "unmasked", "repaired"

# What `carafepp-train` does about a problem, by its severity.
CONSEQUENCES = {
    FATAL: "training does not begin",
    UNUSABLE: "annotation is not used",
    UNTRAINED: "annotation is not trained on",
    UNMASKED: "annotation is used without a mask",
    REPAIRED: "annotation is used with the rest of its mask",
}

RULES = {
    "image without id, file_name, width or height": FATAL,
    "image id used before": FATAL,
    "image file used before": FATAL,
    "file_name leaves the image folder": FATAL,
    "image file missing": FATAL,
    "image file unreadable": FATAL,
    "image file of another size": FATAL,
    "boxes are fractions of the image instead of pixels": FATAL,
    "annotation without id, image_id or category_id": UNUSABLE,
    "annotation id used before": UNUSABLE,
    "annotation id 0, which pycocotools takes for no match": UNUSABLE,
    "annotation of an unknown image": UNUSABLE,
    "iscrowd is neither 0 nor 1": UNUSABLE,
    "bbox or area is not made of finite numbers": UNUSABLE,
    "segmentation cannot be decoded": UNMASKED,
    "segmentation missing, others have one": UNMASKED,
    "segmentation without a pixel in the image": UNMASKED,
    "part of the segmentation cannot be decoded": REPAIRED,
    "unknown category": UNTRAINED,
    "zero area": UNTRAINED,
    "box outside the image": UNTRAINED,
}

# Boxes with a smaller side in pixels, and smaller areas, count as empty.
SMALLEST = 0.01

# Entries that other programs read as integers.
_INTEGERS = {
    "images": ("id", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "iscrowd"),
    "categories": ("id",),
}

# pycocotools counts the pixels of an image in 32 bits, and ids in 64.
MOST_PIXELS, LARGEST_ID = 2**32 - 1, 2**63 - 1


class Violation(NamedTuple):
    """A broken rule of RULES; ids that do not exist are None. `position` is the annotation's index in the file."""

    image_id: object
    annotation_id: object
    rule: str
    detail: str
    position: int | None = None

    @property
    def severity(self) -> str:
        """Return a key of CONSEQUENCES."""
        return RULES[self.rule]

    def __str__(self) -> str:
        return f"image {show(self.image_id)}, annotation {show(self.annotation_id)}: {self.rule} ({self.detail})"


def read_annotations(path: str | Path) -> dict:
    """Read an annotation file, or a list of images without annotations such as that of COCO's test-dev.

    A missing `iscrowd` is 0, and a missing `area` is that of the box. Whole floats, such as 64.0, become integers where the format has
    integers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not valid JSON, for instance truncated, or has no list of images or categories; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"annotations={path} does not exist")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"annotations={path} is not valid JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"annotations={path} is not an annotation file: its brackets are nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"annotations={path} must hold an object with images, annotations and categories, got a {type(content).__name__}")
    content.setdefault("annotations", [])
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise ValueError(f"annotations={path} must have a list of objects {key!r}")
        for entry in content[key]:
            entry.update({name: _to_integer(entry[name]) for name in _INTEGERS[key] if name in entry})
    if not content["images"]:
        raise ValueError(f"annotations={path} lists no images")
    ids = [category.get("id") for category in content["categories"]]
    if not all(_is_integer(i) for i in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"annotations={path} must give every category a distinct integer id, got {show(ids)}")
    named = [category.get("name") for category in content["categories"]]
    if unnamed := [i for i, name in zip(ids, named, strict=True) if not isinstance(name, str | int) or name == ""]:
        raise ValueError(f"annotations={path} must give every category a name, which is a text, and not those with the ids {show(unnamed)}")
    names = [str(name) for name in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        shared = [i for i, name in zip(ids, names, strict=True) if name == twice]
        raise ValueError(
            f"annotations={path} must give every category a name of its own, got {show(twice)} for ids {shared}: rename or merge"
        )
    for annotation in content["annotations"]:
        annotation.setdefault("iscrowd", 0)
        shape = annotation.get("segmentation")
        if isinstance(shape, dict) and isinstance(shape.get("size"), list):
            shape["size"] = [_to_integer(side) for side in shape["size"]]
        box = annotation.get("bbox")
        annotation.setdefault("area", box[2] * box[3] if _is_box(box) else None)
    return content


def check_annotations(content: dict, images: str | Path, *, allow_outside: bool = False) -> list[Violation]:
    """Find every problem in the content of an annotation file, and every image file that is missing in the folder `images`.

    `check_images` checks what the image files contain. `allow_outside` allows names of files outside the folder.
    """
    folder = Path(images)
    present = {file.name for file in os.scandir(folder)} if folder.is_dir() else set()
    problems = list(_check_image_entries(content["images"]))
    files = {}
    for entry in content["images"]:
        name = entry.get("file_name")
        if not isinstance(name, str):
            continue
        # the objects of one entry would be background in the other
        other = files.setdefault(os.path.normpath(name), entry)
        if other is not entry and other.get("id") != entry.get("id"):
            detail = f"{show(name)} is also that of image {show(other.get('id'))}"
            problems.append(Violation(entry.get("id"), None, "image file used before", detail))
        if not allow_outside and leaves_folder(name):
            detail = f"{show(name)}; allow_outside=true reads it nonetheless"
            problems.append(Violation(entry.get("id"), None, "file_name leaves the image folder", detail))
        # a name may contain a folder
        elif name not in present and not _is_file(folder / name):
            problems.append(Violation(entry.get("id"), None, "image file missing", _show_path(folder / name)))
    return [*problems, *_check_unit(content["annotations"]), *_check_annotation_entries(content)]


def leaves_folder(name: str) -> bool:
    """Return whether a file name is absolute, or leads out of its folder."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    # for instance because the path is too long
    except OSError:
        return False


def _show_path(path: Path) -> str:
    """Return a path for a message, shortened, and without characters that cannot be printed."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 300 else show(text)


def _to_integer(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_ID


def _describe(value: object) -> str:
    """Describe a JSON value that should be an integer and is not."""
    return f"the string {show(value)}" if isinstance(value, str) else show(value)


def _find_odd_integers(entry: dict, keys: Sequence[str]) -> list[str]:
    return [f"{key} must be an integer, got {_describe(entry.get(key))}" for key in keys if not _is_integer(entry.get(key))]


def _check_image_entries(entries: list[dict]) -> Iterator[Violation]:
    seen = set()
    for entry in entries:
        image_id, name = entry.get("id"), entry.get("file_name")
        odd = _find_odd_integers(entry, _INTEGERS["images"])
        if not isinstance(name, str):
            odd.append(f"file_name must be a string, got {show(name)}")
        if not odd and (min(entry["width"], entry["height"]) < 1 or entry["width"] * entry["height"] > MOST_PIXELS):
            odd.append(f"an image must have 1 to {MOST_PIXELS:,} pixels, got {show(entry['width'])} x {show(entry['height'])}")
        if odd:
            yield Violation(image_id, None, "image without id, file_name, width or height", f"{'; '.join(odd)}, in {show(entry)}")
            continue
        if image_id in seen:
            yield Violation(image_id, None, "image id used before", f"by {show(name)} and another")
        seen.add(image_id)


def _usable_images(entries: list[dict]) -> list[dict]:
    """Return the images without a problem."""
    # as text, because a broken id may be unhashable
    broken = {show(problem.image_id) for problem in _check_image_entries(entries)}
    return [entry for entry in entries if show(entry.get("id")) not in broken]


def _check_unit(annotations: list[dict]) -> Iterator[Violation]:
    """Find whether the boxes of all annotations are in 0..1, as those of other formats are."""
    boxes = [annotation["bbox"] for annotation in annotations if _is_box(annotation.get("bbox"))]
    # a single box of one pixel may be an object
    if boxes and max(map(max, boxes)) <= 1 and any(value % 1 for box in boxes for value in box):
        first = annotations[0]
        detail = f"all {len(boxes)} are in 0..1, such as {show(boxes[0])}; a bbox is x, y, width, height in pixels"
        yield Violation(first.get("image_id"), first.get("id"), "boxes are fractions of the image instead of pixels", detail)


def _check_annotation_entries(content: dict) -> Iterator[Violation]:
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in _usable_images(content["images"])}
    categories = {category["id"] for category in content["categories"]}
    seen, unmasked = set(), []
    segmented = False
    for position, annotation in enumerate(content["annotations"]):
        image_id, annotation_id = (annotation.get(key) for key in ("image_id", "id"))
        rule, detail = _check_head(annotation, sizes, seen)
        if _is_integer(annotation_id):
            seen.add(annotation_id)
        if rule is None:
            rule, detail = _check_box(annotation, sizes[image_id], categories)
        if rule:
            yield Violation(image_id, annotation_id, rule, detail, position)
        if rule is not None and RULES[rule] == UNUSABLE:
            continue
        mask = read_mask(annotation.get("segmentation"), sizes[image_id])
        segmented = segmented or (mask.has_pixels and not annotation["iscrowd"])
        if mask.shape is None and mask.fault is None:
            detail = f"got {show(annotation.get('segmentation'))}"
            unmasked.append(Violation(image_id, annotation_id, "segmentation missing, others have one", detail, position))
        elif mask.shape is None:
            yield Violation(image_id, annotation_id, "segmentation cannot be decoded", str(mask.fault), position)
        elif not mask.has_pixels:
            detail = mask.fault or f"image of {show(sizes[image_id][1])} x {show(sizes[image_id][0])}, got {show(mask.shape)}"
            yield Violation(image_id, annotation_id, "segmentation without a pixel in the image", detail, position)
        elif mask.fault:
            yield Violation(image_id, annotation_id, "part of the segmentation cannot be decoded", mask.fault, position)
    # a file may have boxes only
    if segmented:
        yield from unmasked


def _check_head(annotation: dict, sizes: dict[int, tuple[int, int]], seen: set[int]) -> tuple[str | None, str]:
    """Return rule and detail of the first problem with ids, crowd, box and area as such, or (None, "")."""
    if odd := _find_odd_integers(annotation, ("id", "image_id", "category_id")):
        return "annotation without id, image_id or category_id", f"{'; '.join(odd)}, in {show(annotation)}"
    if annotation["id"] in seen:
        return "annotation id used before", f"by another entry than {show(annotation)}"
    if annotation["id"] == 0:
        return "annotation id 0, which pycocotools takes for no match", "begin at 1"
    if annotation["image_id"] not in sizes:
        return "annotation of an unknown image", "no entry of images has this id"
    if annotation["iscrowd"] not in (0, 1):
        return "iscrowd is neither 0 nor 1", f"got {_describe(annotation['iscrowd'])}"
    if not _is_box(annotation.get("bbox")) or not _are_finite([annotation["area"]]):
        return "bbox or area is not made of finite numbers", f"bbox {show(annotation.get('bbox'))}, area {show(annotation['area'])}"
    return None, ""


def _check_box(annotation: dict, size: tuple[int, int], categories: set[int]) -> tuple[str | None, str]:
    """Return rule and detail of the first problem of a usable annotation with category or box, or (None, "")."""
    box, area = annotation["bbox"], annotation["area"]
    if annotation["category_id"] not in categories:
        return "unknown category", f"category_id {annotation['category_id']}"
    if min(*box[2:], area) < SMALLEST:
        return "zero area", f"bbox {box}, area {area}"
    left, top, right, bottom = clip_box(box, size)
    # rounding may lose a pixel
    if min(right - left, bottom - top) < SMALLEST or (right - left) < box[2] - 1 or (bottom - top) < box[3] - 1:
        return "box outside the image", f"bbox {box} of an image of {size[1]} x {size[0]}"
    return None, ""


def _are_finite(numbers: list) -> bool:
    try:
        return all(map(math.isfinite, numbers))
    except (TypeError, OverflowError):
        return False


def _is_box(box: object) -> bool:
    return isinstance(box, list) and len(box) == 4 and _are_finite(box)


def clip_box(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Clip a box x, y, width, height to an image of `size` (height, width) -> x1, y1, x2, y2."""
    x, y, width, height = box
    return max(x, 0), max(y, 0), min(x + width, size[1]), min(y + height, size[0])


def check_images(content: dict, images: str | Path, *, allow_outside: bool = False, **reading: Unpack[ReadOptions]) -> Iterator[Violation]:
    """Decode every image that exists, in threads with a progress bar, and compare its size with that in the annotation file.

    Files outside the folder `images` are left alone without `allow_outside`. `reading` are options of `read_image`.
    """

    def look(entry: dict) -> Violation | None:
        path = Path(images) / entry["file_name"]
        if not _is_file(path):
            return None
        try:
            size = read_image(path, **reading).size
        except ValueError as error:
            return Violation(entry["id"], None, "image file unreadable", str(error))
        expected = entry["width"], entry["height"]
        if size == expected:
            return None
        sizes = f"{_show_path(path)} is {size[0]} x {size[1]}, annotations say {expected[0]} x {expected[1]}"
        return Violation(entry["id"], None, "image file of another size", sizes + suggest_orientation(size, expected, **reading))

    entries = [entry for entry in _usable_images(content["images"]) if allow_outside or not leaves_folder(entry["file_name"])]
    # decoding releases the interpreter lock
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(look, entries), "decoding", len(entries), unit="image", leave=False, disable=None)
        yield from (problem for problem in found if problem)


def refuse_or_count(problems: Sequence[Violation], annotations: str | Path) -> None:
    """Refuse problems that are FATAL, and log how many annotations the others affect.

    Raises:
        ValueError: there is a FATAL problem; the message names the first of each rule.
    """
    counts = Counter(problem.rule for problem in problems)
    first = {problem.rule: problem for problem in reversed(problems)}
    lines = [f"{count} x {rule}, the first is {first[rule]}" for rule, count in counts.items() if RULES[rule] == FATAL]
    if lines:
        raise ValueError(f"annotations={annotations} cannot be used: {'; '.join(lines)}; carafepp-validate lists all")
    for rule, count in counts.items():
        consequence = CONSEQUENCES[RULES[rule]]
        logger.warning("%s: %d x %s: %s, the first is %s", annotations, count, rule, consequence, first[rule])
    if counts:
        logger.warning("%s: carafepp-validate lists all of them", annotations)
