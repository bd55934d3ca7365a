"""The two parts of every data set, and the division of one annotation file into both."""

import hashlib
import json
from collections.abc import Sequence

SPLITS = ("train", "val")


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def take_share(content: dict, share: Sequence[float]) -> dict:
    """Take a part of the images of an annotation file in COCO's format, and their annotations.

    The images are ordered by a hash of their file names. The order thus depends neither on their order in the file nor on a seed, and
    consecutive frames of a video do not follow each other in it.

    Args:
        content: content of the file; it stays as it is.
        share: where the part begins and ends, as fractions in 0..1: [0, 0.8] are the first four fifths.

    Returns:
        The content with the images of the part. It keeps annotations of unknown images.

    Raises:
        ValueError: the share is not a pair of ascending fractions, or holds no image.
    """
    if len(share) != 2 or not 0 <= share[0] < share[1] <= 1:
        raise ValueError(f"share must be two ascending fractions in 0..1, such as [0, 0.8], got {list(share)}")
    ordered = sorted(content["images"], key=lambda image: hashlib.sha256(str(image.get("file_name")).encode()).digest())
    # a product such as 0.7 * 10 may be below the whole number that it stands for
    first, end = (int(fraction * len(ordered) + 1e-6) for fraction in share)
    if first == end:
        raise ValueError(f"share={list(share)} of {len(ordered)} images holds no image")
    # as text, because a wrong id may be unhashable
    left_out = {json.dumps(image.get("id")) for image in [*ordered[:first], *ordered[end:]]}

    def is_taken(image_id: object) -> bool:
        return json.dumps(image_id) not in left_out

    return content | {
        "images": [image for image in content["images"] if is_taken(image.get("id"))],
        "annotations": [annotation for annotation in content["annotations"] if is_taken(annotation.get("image_id"))],
    }
