"""Check COCO annotation files: every problem is reported with image id, annotation id and the broken rule."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from .images import read_image

logger = logging.getLogger(__name__)

# Consequences: training does not begin; the annotation is not used; the annotation is evaluated but not trained on.
FATAL, UNUSABLE, UNTRAINED = "fatal", "unusable", "untrained"

RULES = {
    "image without id, file_name, width or height": FATAL,
    "image id used before": FATAL,
    "image file missing": FATAL,
    "image file unreadable": FATAL,
    "image file of another size": FATAL,
    "annotation without id, image_id or category_id": UNUSABLE,
    "annotation id used before": UNUSABLE,
    "annotation id 0, which pycocotools takes for no match": UNUSABLE,
    "annotation of an unknown image": UNUSABLE,
    "iscrowd is neither 0 nor 1": UNUSABLE,
    "bbox or area is not made of finite numbers": UNUSABLE,
    "segmentation cannot be decoded": UNUSABLE,
    "segmentation missing, others have one": UNUSABLE,
    "unknown category": UNTRAINED,
    "zero area": UNTRAINED,
    "box outside the image": UNTRAINED,
}

# Boxes with a smaller side in pixels, and smaller areas, count as empty.
SMALLEST = 0.01


class Violation(NamedTuple):
    """A broken rule of RULES; ids that do not exist are None. `position` is the annotation's index in the file."""

    image_id: object
    annotation_id: object
    rule: str
    detail: str
    position: int | None = None

    @property
    def severity(self) -> str:
        """Return the consequence: FATAL, UNUSABLE or UNTRAINED."""
        return RULES[self.rule]

    def __str__(self) -> str:
        return f"image {self.image_id}, annotation {self.annotation_id}: {self.rule} ({self.detail})"


def read_annotations(path: str | Path) -> dict:
    """Read an annotation file, or a list of images without annotations such as that of COCO's test-dev.

    A missing `iscrowd` is 0, and a missing `area` is that of the box.

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
    if not isinstance(content, dict):
        raise ValueError(f"annotations={path} must hold an object with images, annotations and categories, got a {type(content).__name__}")
    content.setdefault("annotations", [])
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise ValueError(f"annotations={path} must have a list of objects {key!r}")
    if not content["images"]:
        raise ValueError(f"annotations={path} lists no images")
    ids = [category.get("id") for category in content["categories"]]
    if not all(isinstance(i, int) for i in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"annotations={path} must give every category a distinct integer id, got {ids[:100]}")
    for annotation in content["annotations"]:
        annotation.setdefault("iscrowd", 0)
        box = annotation.get("bbox")
        annotation.setdefault("area", box[2] * box[3] if _is_box(box) else None)
    return content


def check_annotations(content: dict, images: str | Path) -> list[Violation]:
    """Find every problem of the content of an annotation file, and every image file that is missing in the folder `images`.

    `check_images` checks what the image files contain.
    """
    folder = Path(images)
    present = {file.name for file in os.scandir(folder)} if folder.is_dir() else set()
    problems = list(_check_image_entries(content["images"]))
    for entry in content["images"]:
        name = entry.get("file_name")
        # a name may contain a folder
        if isinstance(name, str) and name not in present and not (folder / name).is_file():
            problems.append(Violation(entry.get("id"), None, "image file missing", str(folder / name)))
    return [*problems, *_check_annotation_entries(content)]


def _check_image_entries(entries: list[dict]) -> Iterator[Violation]:
    seen = set()
    for entry in entries:
        image_id, name = entry.get("id"), entry.get("file_name")
        sizes = [entry.get(side) for side in ("height", "width")]
        if not isinstance(image_id, int) or not isinstance(name, str) or not all(isinstance(s, int) and s > 0 for s in sizes):
            yield Violation(image_id, None, "image without id, file_name, width or height", f"got {json.dumps(entry)[:200]}")
            continue
        if image_id in seen:
            yield Violation(image_id, None, "image id used before", f"by {name} and another")
        seen.add(image_id)


def _usable_images(entries: list[dict]) -> list[dict]:
    """Return the images without a problem."""
    # as text, because a broken id may be unhashable
    broken = {repr(problem.image_id) for problem in _check_image_entries(entries)}
    return [entry for entry in entries if repr(entry.get("id")) not in broken]


def _check_annotation_entries(content: dict) -> Iterator[Violation]:
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in _usable_images(content["images"])}
    categories = {category["id"] for category in content["categories"]}
    segmented = any(annotation.get("segmentation") for annotation in content["annotations"])
    seen = set()
    for position, annotation in enumerate(content["annotations"]):
        image_id, annotation_id = (annotation.get(key) for key in ("image_id", "id"))
        if not all(isinstance(annotation.get(key), int) for key in ("id", "image_id", "category_id")):
            rule, detail = "annotation without id, image_id or category_id", f"got {json.dumps(annotation)[:200]}"
        elif annotation_id in seen:
            rule, detail = "annotation id used before", f"entry {position} of annotations"
        elif annotation_id == 0:
            rule, detail = "annotation id 0, which pycocotools takes for no match", "begin at 1"
        elif image_id not in sizes:
            rule, detail = "annotation of an unknown image", "no entry of images has this id"
        elif annotation["iscrowd"] not in (0, 1):
            rule, detail = "iscrowd is neither 0 nor 1", f"got {annotation['iscrowd']!r}"
        else:
            rule, detail = _check_shape(annotation, sizes[image_id], categories, segmented)
        if isinstance(annotation_id, int):
            seen.add(annotation_id)
        if rule:
            yield Violation(image_id, annotation_id, rule, detail, position)


def _check_shape(annotation: dict, size: tuple[int, int], categories: set[int], segmented: bool) -> tuple[str | None, str]:
    """Return rule and detail of the first problem with box, mask or category, or (None, "")."""
    box, shape = annotation.get("bbox"), annotation.get("segmentation")
    if box is None or not _is_box(box) or not _are_finite([annotation["area"]]):
        return "bbox or area is not made of finite numbers", f"bbox {box}, area {annotation.get('area')}"
    if not shape and segmented:
        return "segmentation missing, others have one", f"got {shape}"
    if shape and (fault := find_mask_fault(shape, size)):
        return "segmentation cannot be decoded", fault
    if annotation["category_id"] not in categories:
        return "unknown category", f"category_id {annotation['category_id']}"
    if min(*box[2:], annotation["area"]) < SMALLEST:
        return "zero area", f"bbox {box}, area {annotation['area']}"
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


def find_mask_fault(shape: object, size: tuple[int, int]) -> str | None:
    """Return why polygons or run lengths cannot be decoded to a mask of `size` (height, width), or None."""
    if isinstance(shape, list):
        for polygon in shape:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                return f"a polygon must be a list of at least three x, y, got {str(polygon)[:80]}"
            if not _are_finite(polygon):
                return f"a polygon has coordinates that are not finite numbers, got {str(polygon)[:80]}"
        return None
    if not isinstance(shape, dict) or "counts" not in shape or shape.get("size") != list(size):
        return f"run lengths must have counts and the size {list(size)} of the image, got {str(shape)[:80]}"
    counts = shape["counts"]
    if isinstance(counts, list):
        if not all(isinstance(v, int) and v >= 0 for v in counts):
            return "run lengths must be integers of at least 0"
        total = sum(counts)
    else:
        try:
            total = _sum_run_lengths(counts)
        except (ValueError, AttributeError, IndexError):
            return "compressed run lengths are damaged"
    return None if total == size[0] * size[1] else f"run lengths add up to {total} pixels, not {size[0]} x {size[1]}"


def _sum_run_lengths(counts: str) -> int:
    """Sum up compressed run lengths; pycocotools would read beyond the end of damaged ones."""
    lengths, value, shift = [], 0, 0
    for byte in counts.encode("ascii"):
        code = byte - 48
        if not 0 <= code < 64:
            raise ValueError(f"{byte} is not a character of run lengths")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            # bit 4 of the last character is the sign; from the fourth on, lengths are differences to the second last
            value -= (code >> 4 & 1) << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            if lengths[-1] < 0:
                raise ValueError("a length is negative")
            value = shift = 0
    if shift:
        raise ValueError("the last length is cut off")
    return sum(lengths)


def check_images(content: dict, images: str | Path) -> Iterator[Violation]:
    """Decode every image that exists, in threads with a progress bar, and compare its size with that in the annotation file."""

    def look(entry: dict) -> Violation | None:
        path = Path(images) / entry["file_name"]
        try:
            size = read_image(path).size
        except FileNotFoundError:
            return None
        except ValueError as error:
            return Violation(entry["id"], None, "image file unreadable", str(error))
        if size == (entry["width"], entry["height"]):
            return None
        sizes = f"{path} is {size[0]} x {size[1]}, annotations say {entry['width']} x {entry['height']}"
        return Violation(entry["id"], None, "image file of another size", sizes)

    entries = _usable_images(content["images"])
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
        use = "not used" if RULES[rule] == UNUSABLE else "not trained on"
        logger.warning("%s: %d annotations %s: %s, the first is %s", annotations, count, use, rule, first[rule])
    if counts:
        logger.warning("%s: carafepp-validate lists all of them", annotations)


def decode_mask(shape: list | dict, size: tuple[int, int]) -> np.ndarray:
    """Decode polygons or run lengths -> [H, W] uint8 in {0, 1}, as pycocotools' annToMask."""
    runs: Any = shape
    if isinstance(runs, list):
        runs = rle.merge(rle.frPyObjects(runs, *size))
    elif isinstance(runs["counts"], list):
        runs = rle.frPyObjects(runs, *size)
    return rle.decode(runs)
