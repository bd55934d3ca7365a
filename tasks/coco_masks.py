"""Segmentations in COCO's format, polygons or run lengths: their pixels, and the usable part of damaged ones."""

import math
import reprlib
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

# Limits of a polygon in pixels: pycocotools computes in 32-bit integers, and stores five points for each pixel of an outline.
FARTHEST, LONGEST = 1e6, 5e6

_shortened = reprlib.Repr()
_shortened.maxlist = _shortened.maxdict = 10
_shortened.maxstring = _shortened.maxother = 100


def show(value: object) -> str:
    """Return a value of a JSON file for a message, on one line and shortened, even if it is deep or long."""
    return _shortened.repr(value)[:300]


class UsableMask(NamedTuple):
    """The part of a segmentation that can be decoded.

    `shape` is polygons or run lengths for `decode_mask`, or None if there are none. `fault` describes the damage, or is None.
    """

    shape: list | dict | None
    fault: str | None
    has_pixels: bool


def read_mask(shape: object, size: tuple[int, int]) -> UsableMask:
    """Find the part of a segmentation that can be decoded, for an object in an image of `size` (height, width).

    Polygons that cannot be decoded are omitted, and so is an odd number at the end of a polygon. None, [] and [[]] have no mask and
    no fault.
    """
    if shape is None or (isinstance(shape, list) and all(part == [] for part in shape)):
        return UsableMask(None, None, False)
    if isinstance(shape, dict):
        try:
            lengths = _read_run_lengths(shape, size)
        except ValueError as error:
            return UsableMask(None, str(error), False)
        return UsableMask(shape, None, sum(lengths[1::2]) > 0)
    if not isinstance(shape, list):
        return UsableMask(None, f"a segmentation must be a list of polygons, or run lengths, got {show(shape)}", False)
    if all(isinstance(value, int | float) for value in shape):
        return UsableMask(None, f"a polygon needs a list around it, [[x1, y1, x2, y2, ...]], got {show(shape)}", False)
    read = [_read_polygon(part) for part in shape]
    polygons: Any = [polygon for polygon, _ in read if polygon]
    faults = [fault for _, fault in read if fault]
    fault = f"{len(faults)} of {len(shape)} polygons damaged: {faults[0]}" if faults else None
    if not polygons:
        return UsableMask(None, fault, False)
    return UsableMask(polygons, fault, any(rle.area(each) for each in rle.frPyObjects(polygons, *size)))


def _read_polygon(part: object) -> tuple[list[float] | None, str | None]:
    """Return the numbers that pycocotools can decode, or None, and the fault, or None."""
    if not isinstance(part, list) or len(part) < 6:
        return None, f"a polygon must be a list of at least three x, y, got {show(part)}"
    try:
        numbers, fault = [float(value) for value in part], None
    except (TypeError, ValueError, OverflowError):
        numbers, fault = [math.nan], None
    # comparisons with NaN are false
    low, high = min(numbers), max(numbers)
    if not all(map(math.isfinite, numbers)):
        return None, f"a polygon has coordinates that are not finite numbers, got {show(part)}"
    if not -FARTHEST <= low <= high <= FARTHEST:
        return None, f"a polygon has coordinates beyond {FARTHEST:,.0f} pixels, got {show(part)}"
    if len(numbers) * (high - low) > LONGEST and (length := _measure_outline(numbers)) > LONGEST:
        return None, f"a polygon has an outline of {length:,.0f} pixels, more than {LONGEST:,.0f}, got {show(part)}"
    if any(isinstance(value, str) for value in part):
        fault = f"a polygon has strings for coordinates, got {show(part)}"
    if len(numbers) % 2:
        numbers, fault = numbers[:-1], f"a polygon must be pairs x, y, got {len(part)} numbers {show(part)}"
    return numbers, fault


def _measure_outline(numbers: list[float]) -> float:
    """Return the number of pixels along the outline of a polygon x1, y1, x2, y2, ..."""
    points = np.reshape(numbers[: len(numbers) // 2 * 2], (-1, 2))
    return float(np.abs(points - np.roll(points, 1, 0)).max(1).sum())


def _read_run_lengths(shape: dict, size: tuple[int, int]) -> list[int]:
    """Return run lengths, beginning with the background.

    Raises:
        ValueError: the run lengths are not those of a mask of `size`.
    """
    counts = shape.get("counts")
    if counts is None or shape.get("size") != list(size):
        raise ValueError(f"run lengths must have counts and the size {list(size)} of the image, got {show(shape)}")
    if isinstance(counts, str):
        lengths = _decompress(counts)
    elif isinstance(counts, list) and all(isinstance(v, int | float) and v >= 0 and v == v // 1 for v in counts):
        lengths = counts
    else:
        raise ValueError(f"run lengths must be whole numbers of at least 0, or a string of compressed ones, got {show(counts)}")
    if sum(lengths) != size[0] * size[1]:
        raise ValueError(f"run lengths add up to {show(sum(lengths))} pixels, not {size[0]} x {size[1]}")
    return lengths


def _decompress(counts: str) -> list[int]:
    """Decompress run lengths; pycocotools would read beyond the end of damaged ones.

    Raises:
        ValueError: the run lengths are damaged.
    """
    lengths, value, shift = [], 0, 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(f"compressed run lengths are damaged at {character!r}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            # bit 4 of the last character is the sign; from the fourth on, lengths are differences from the last but one
            value -= (code >> 4 & 1) << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            if lengths[-1] < 0:
                raise ValueError("compressed run lengths are damaged: a length is negative")
            value = shift = 0
    if shift:
        raise ValueError("compressed run lengths are damaged: the last length is cut off")
    return lengths


def decode_mask(shape: list | dict | None, size: tuple[int, int]) -> np.ndarray:
    """Decode a `UsableMask.shape` -> [H, W] uint8 in {0, 1}, as pycocotools' annToMask; None has no pixels."""
    if shape is None:
        return np.zeros(size, np.uint8)
    runs: Any = shape
    if isinstance(runs, list):
        runs = rle.merge(rle.frPyObjects(runs, *size))
    elif isinstance(runs["counts"], list):
        runs = rle.frPyObjects(runs, *size)
    return rle.decode(runs)
