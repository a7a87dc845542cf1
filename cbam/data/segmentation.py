"""Validate the mask of a COCO annotation: polygons, or run lengths (RLE), plain or compressed.

Boxes need no mask. But a damaged one is a sign of a damaged file, and crashes other readers.
"""

import math
from typing import Any

MAX_SIDE = 1 << 20


def mask_fault(mask: Any, height: int, width: int) -> str:
    """The fault of the `segmentation` of an object in an image of height x width; "" if there is none."""
    if isinstance(mask, list):
        return _polygons_fault(mask)
    if not isinstance(mask, dict):
        return f"segmentation is a {type(mask).__name__}, expected polygons or run lengths"
    size = mask.get("size")
    if size != [height, width]:
        return f"segmentation is for an image of height and width {size}, but the image has {[height, width]}"
    try:
        runs = _runs(mask.get("counts"))
    except ValueError as error:
        return f"segmentation: {error}"
    if sum(runs) != height * width:
        return f"segmentation has runs of {sum(runs)} pixels in total, but the image has {height * width}"
    return ""


def _polygons_fault(polygons: list) -> str:
    for polygon in polygons:
        if polygon == []:  # other tools write [[]] where there is no mask
            continue
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "segmentation: a polygon must be a list of x and y in turn, with three points or more"
        try:
            finite = all(map(math.isfinite, polygon))
        except (TypeError, OverflowError):  # not a number, or an integer too large for a float
            finite = False
        if not finite:
            return "segmentation: a polygon has a coordinate that is not a finite number"
    return ""


def _runs(counts: Any) -> list[int]:
    """The run lengths. Compressed: five bits a character, each run relative to the one two before it."""
    if isinstance(counts, list):
        if not all(type(count) is int and 0 <= count <= MAX_SIDE**2 for count in counts):
            raise ValueError("counts must be integers >= 0")
        return counts
    if not isinstance(counts, str):
        raise ValueError(f"counts are a {type(counts).__name__}, expected a list or a string")
    runs: list[int] = []
    value = shift = 0
    for letter in counts:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("its compressed counts are damaged")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if not 0 <= runs[-1] <= MAX_SIDE**2:
            raise ValueError("its compressed counts are damaged")
        value = shift = 0
    if shift:
        raise ValueError("its compressed counts are truncated")
    return runs
