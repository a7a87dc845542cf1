"""Detection metrics: COCO's twelve, and the average precision of Pascal VOC.

Both take two mappings from image ids: the detections (`boxes` (N, 4), `scores` (N,), `labels` (N,), as
torchvision's detectors return them) and the ground truth (`boxes`, `labels`, `area`, `crowd`, `difficult`, as
in the samples of a data set). Boxes are x0 y0 x1 y1 in pixels, ends exclusive. Each image is scored once,
even if several processes saw it, since a mapping holds it once. Results are percentages, NaN where there is
nothing to detect.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cbam.errors import DataError, InputError, NonFiniteError
from cbam.train.coco_protocol import Boxes, box_metrics, overlapping

COCO_NUMBERS = (
    "AP", "AP50", "AP75", "AP small", "AP medium", "AP large",
    "AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large",
)  # fmt: skip
POINTS = ("area", "11")
LISTED = 10
# The kit's 0:0.1:1. MATLAB counts from both ends, and 3 x 0.1 exceeds 0.3 in floating point, so a recall of
# exactly 0.3 does not reach the fourth point.
_TENTHS = (*(0.1 * k for k in range(6)), *(1 - 0.1 * k for k in range(4, -1, -1)))

Found = Mapping[int, Mapping[str, Tensor]]
Truth = Mapping[int, Mapping[str, Tensor]]


def coco_numbers(found: Found, truth: Truth, classes: Sequence[str]) -> dict[str, float]:
    """COCO's twelve metrics for boxes, by its own protocol, in percent.

    Args:
        found: detections by image; an image without an entry has none.
        truth: objects by image, with an entry for every image that counts.
        classes: names of the labels 1, 2, ...

    Raises:
        NonFiniteError: a box or a score is NaN or infinite; COCO's own code would score it.
        DataError: an image is not in `truth`, or a label is not a class.
        InputError: the shapes of the tensors do not match.
    """
    check_detections(found, truth, len(classes))
    numbers = {image: number for number, image in enumerate(truth)}
    detections, objects = (_flat(mapping, len(classes), numbers) for mapping in (found, truth))
    values = box_metrics(detections, objects, len(classes))
    return {name: 100 * value for name, value in zip(COCO_NUMBERS, values, strict=True)}


class VocScore(NamedTuple):
    """Average precision of each class in percent, and the mean over the classes with an object.

    If two classes share a name, `classes` has the last; the mean includes both.
    """

    mean: float
    classes: dict[str, float]


def voc_ap(
    found: Found, truth: Truth, classes: Sequence[str], *, points: str = "area", iou: float = 0.5
) -> VocScore:
    """Average precision by the rules of Pascal VOC's development kit, in percent.

    A detection is assigned to the object of its class and image that it overlaps most. It is correct if the
    overlap is at least `iou` and no detection with a higher score has the same object. If the object is
    difficult, the detection counts neither way; difficult objects need not be found. The kit counts pixels
    from 1 and adds 1 to widths, which with exclusive ends is the plain overlap.

    Args:
        points: "area" under the monotone precision (from 2010 on), or "11", its mean at recall 0, 0.1, ..., 1
            (2007).
        iou: the overlap required.

    Raises:
        As `coco_numbers`.
    """
    return voc_scores(found, truth, classes, [(iou, points)])[0]


def voc_scores(
    found: Found, truth: Truth, classes: Sequence[str], asked: Sequence[tuple[float, str]]
) -> list[VocScore]:
    """`voc_ap` for several pairs of `iou` and `points`, in the time of one: the matching is shared."""
    if wrong := [points for _, points in asked if points not in POINTS]:
        raise InputError(f'points must be "area" or "11", got {wrong[0]!r}')
    check_detections(found, truth, len(classes))
    numbers = {image: number for number, image in enumerate(truth)}
    detections, objects = (_flat(mapping, len(classes), numbers) for mapping in (found, truth))
    best, most = _best(detections, objects, min(iou for iou, _ in asked))
    counts = np.bincount(objects.key[~objects.difficult] % (len(classes) + 1), minlength=len(classes) + 1)
    own = _by_class(detections, len(classes))
    scores = []
    for iou, points in asked:
        right = _right(best, most, objects.difficult, iou)
        score = _area if points == "area" else _eleven
        judged = [right[mine] for mine in own]
        values = [
            100 * score(one[one >= 0] == 1, count) if count else float("nan")
            for one, count in zip(judged, counts[1:].tolist(), strict=True)
        ]
        known = [value for value in values if value == value]
        mean = sum(known) / len(known) if known else float("nan")
        scores.append(VocScore(mean, dict(zip(classes, values, strict=True))))
    return scores


def check_detections(found: Found, truth: Truth, classes: int) -> None:
    """Refuse detections that cannot be scored: see `coco_numbers`."""
    unknown = [image for image in found if image not in truth]
    if unknown:
        raise DataError(f"detections on images that are not in the data set: {_some(unknown)}")
    for image, own in found.items():
        boxes, scores, labels = own["boxes"], own["scores"], own["labels"]
        if boxes.shape != (len(scores), 4) or scores.shape != labels.shape or scores.dim() != 1:
            shapes = ", ".join(str(tuple(t.shape)) for t in (boxes, scores, labels))
            raise InputError(
                f"image {image}: boxes, scores and labels must be (N, 4), (N,), (N,), got {shapes}"
            )
        if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
            raise NonFiniteError(f"image {image}: a detection has a box or a score that is not finite")
    for what, mapping in (("detections", found), ("objects", truth)):
        labels = torch.cat([own["labels"].flatten() for own in mapping.values()] or [torch.ones(1)])
        wrong = labels[(labels < 1) | (labels > classes)].unique().tolist()
        if wrong:
            raise DataError(f"{what} with labels that are not classes (1 to {classes}): {_some(wrong)}")


def _flat(mapping: Found | Truth, classes: int, numbers: Mapping[int, int]) -> Boxes:
    """A mapping as arrays, images by their numbers; a missing field is 0, a missing area that of the box."""
    parts = list(mapping.values())
    if not parts:
        parts = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}]
    counts = [len(own["labels"]) for own in parts]

    def column(name: str) -> np.ndarray:
        none = torch.zeros(max(counts))
        values = [own[name] if name in own else none[:n] for own, n in zip(parts, counts, strict=True)]
        return torch.cat(values).double().cpu().numpy()

    image = np.repeat([numbers[i] for i in mapping] or [0], counts)
    key = image * (classes + 1) + column("labels").astype(np.int64)
    boxes, score = column("boxes"), column("scores")
    stated = np.repeat(["area" in own for own in parts], counts)
    area = np.where(stated, column("area"), (boxes[:, 2:] - boxes[:, :2]).prod(1))
    order = np.lexsort((-score, key))
    flags = (column(name)[order] > 0 for name in ("crowd", "difficult"))
    return Boxes(key[order], boxes[order], score[order], area[order], *flags)


def _by_class(found: Boxes, classes: int) -> list[np.ndarray]:
    """The detections of each class, by descending score."""
    falling = np.argsort(-found.score, kind="stable")
    label = found.key[falling] % (classes + 1)
    ends = np.bincount(label, minlength=classes + 1)[1:].cumsum()
    return np.split(falling[np.argsort(label, kind="stable")], ends[:-1])


def _best(found: Boxes, objects: Boxes, least: float) -> tuple[np.ndarray, np.ndarray]:
    """For each detection the object it overlaps most (the first of equals; -1 for none), and the overlap."""
    best, most = np.full(len(found.key), -1), np.zeros(len(found.key))
    objects = objects._replace(crowd=np.zeros_like(objects.crowd))  # VOC has none
    for d, o, overlap in overlapping(found, objects, least):
        first = np.flatnonzero(np.diff(d, prepend=-1))
        if len(first):
            top = np.maximum.reduceat(overlap, first)
            is_top = overlap == np.repeat(top, np.diff(first, append=len(d)))
            place = np.minimum.reduceat(np.where(is_top, np.arange(len(d)), len(d)), first)
            best[d[first]], most[d[first]] = o[place], top
    return best, most


def _right(best: np.ndarray, most: np.ndarray, difficult: np.ndarray, iou: float) -> np.ndarray:
    """For each detection: 1 correct, 0 wrong, -1 on a difficult object.

    Within a class and image they come by descending score, so the first one on an object is the correct one.
    """
    right = np.zeros(len(best), np.int64)
    near = np.flatnonzero((best >= 0) & (most >= iou))
    _, first = np.unique(best[near], return_index=True)
    right[near[first]] = 1
    right[near[difficult[best[near]]]] = -1
    return right


def _curve(right: np.ndarray, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after each detection."""
    hits = right.cumsum()
    return hits / objects, hits / np.arange(1, len(right) + 1)


def _eleven(right: np.ndarray, objects: int) -> float:
    recall, precision = _curve(right, objects)
    return sum(precision[recall >= tenth].max(initial=0.0) for tenth in _TENTHS) / 11


def _area(right: np.ndarray, objects: int) -> float:
    recall, precision = _curve(right, objects)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * highest).sum())


def _some(values: Sequence) -> str:
    more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return ", ".join(map(str, values[:LISTED])) + more
