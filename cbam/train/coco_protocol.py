"""COCO's twelve metrics for boxes, by the protocol of its evaluation code, in numpy.

Per image and class the hundred detections with the highest scores are matched in descending order, for ten
overlaps and four area ranges: each takes the unmatched object that it overlaps most; crowds and objects
outside the range come last, and a match with them counts neither way. Precision is made monotone and sampled
at 101 recalls. pycocotools does this pair by pair; here all images and classes are processed together, and
the only loop is over the rank of a detection within its image and class.

N detections and M objects of all images; P pairs of them that overlap enough; A areas, T overlaps.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # all, small, medium, large
MOST = 100  # detections per class and image
FEW = (1, 10)
_CHUNK = 1 << 21  # pairs processed at once


class Boxes(NamedTuple):
    """Boxes of all images, sorted by image and label, then by descending score.

    Attributes:
        key: (N,) int, number of the image * (classes + 1) + label, so that each image and class is one slice.
        boxes: (N, 4), x0 y0 x1 y1.
        score, area: (N,). crowd, difficult: (N,) bool.
    """

    key: np.ndarray
    boxes: np.ndarray
    score: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray


def box_metrics(found: Boxes, truth: Boxes, classes: int) -> list[float]:
    """AP at all, .5, .75 overlap, of small, medium, large; recall of 1, 10, 100, of small, medium, large.

    As fractions; NaN where there is no object.
    """
    rank = np.arange(len(found.key)) - np.searchsorted(found.key, found.key)
    kept = np.flatnonzero(rank < MOST)
    found, rank = Boxes(*(part[kept] for part in found)), rank[kept]
    low, high = AREAS[:, :1], AREAS[:, 1:]
    ignored = (truth.area < low) | (truth.area > high) | truth.crowd  # (A, M)
    matched, void = _match(found, truth, ignored)
    outside = (found.area < low) | (found.area > high)
    void |= ~matched & outside[:, None]
    precision = np.full((len(AREAS), len(OVERLAPS), len(RECALLS), classes), np.nan)
    recall = np.full((len(AREAS), len(OVERLAPS), classes), np.nan)
    few = np.full((len(FEW), len(OVERLAPS), classes), np.nan)
    falling = np.argsort(-found.score, kind="stable")
    label, wanted = found.key[falling] % (classes + 1), truth.key % (classes + 1)
    for k in range(classes):
        objects = (~ignored[:, wanted == k + 1]).sum(1)
        mine = falling[label == k + 1]
        right, counted = matched[..., mine] & ~void[..., mine], ~void[..., mine]
        for a in np.flatnonzero(objects):
            precision[a, ..., k], recall[a, :, k] = _curve(right[a], counted[a], objects[a])
        if objects[0]:
            few[..., k] = [right[0][:, rank[mine] < n].sum(1) / objects[0] for n in FEW]
    ap = [precision[0], precision[0, 0], precision[0, 5], *precision[1:]]
    return [_mean(values) for values in (*ap, *few, *recall)]


def _match(found: Boxes, truth: Boxes, ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each detection is matched, and whether with an ignored object: (A, T, N) bool, twice."""
    matched = np.zeros((len(AREAS), len(OVERLAPS), len(found.key)), bool)
    void, taken = np.zeros_like(matched), np.zeros((*matched.shape[:2], len(truth.key)), bool)
    d, o, overlap = (
        np.concatenate(part) for part in zip(*overlapping(found, truth, OVERLAPS[0]), strict=True)
    )
    # The rank of each detection among those of its image and class that overlap an object.
    first = np.flatnonzero(np.diff(d, prepend=-1))
    groups = found.key[d[first]]
    turn = np.repeat(np.arange(len(first)) - np.searchsorted(groups, groups), np.diff(first, append=len(d)))
    order = np.argsort(turn, kind="stable")
    for pairs in np.split(order, np.flatnonzero(np.diff(turn[order])) + 1):
        _take_turn(d[pairs], o[pairs], overlap[pairs], ignored, truth.crowd, matched, void, taken)
    return matched, void


def _take_turn(d, o, overlap, ignored, crowd, matched, void, taken) -> None:
    """Match one detection per image and class; `d` and `o` are the indices of the pairs, sorted by d."""
    if not len(d):
        return
    first = np.flatnonzero(np.diff(d, prepend=-1))
    sizes = np.diff(first, append=len(d))
    free = (overlap >= OVERLAPS[:, None]) & (~taken[..., o] | crowd[o])  # (A, T, P)
    worth = np.where(free, overlap + np.where(ignored[:, None, o], 0, 2), -1)
    best = np.maximum.reduceat(worth, first, axis=-1)
    is_best = free & (worth == np.repeat(best, sizes, axis=-1))
    place = np.maximum.reduceat(
        np.where(is_best, np.arange(len(d)), -1), first, axis=-1
    )  # the last of equals
    a, t, i = np.nonzero(place >= 0)
    chosen = o[place[a, t, i]]
    matched[a, t, d[first[i]]] = True
    void[a, t, d[first[i]]] = ignored[a, chosen]
    taken[a, t, chosen] = True


def overlapping(
    found: Boxes, truth: Boxes, least: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Indices of detections and objects of the same image and class with an overlap of at least `least`.

    Yields detections, objects, overlaps. All pairs of a detection come together, in the order of the objects.
    """
    start = np.searchsorted(truth.key, found.key)
    count = np.searchsorted(truth.key, found.key, side="right") - start
    total = count.cumsum()
    cuts = np.searchsorted(total, np.arange(_CHUNK, total[-1] if len(total) else 0, _CHUNK))
    for own in np.split(np.arange(len(found.key)), cuts):
        d = np.repeat(own, count[own])
        o = np.arange(len(d)) - np.repeat(count[own].cumsum() - count[own], count[own]) + start[d]
        overlap = _overlap(found.boxes[d], truth.boxes[o], truth.crowd[o])
        near = overlap >= least
        yield d[near], o[near], overlap[near]


def _overlap(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Intersection over union; for a crowd, over the area of the detection `a`: (P, 4) twice -> (P,)."""
    shared = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0).prod(1)
    own, other = (boxes[:, 2:] - boxes[:, :2] for boxes in (a, b))
    whole = np.where(crowd, own.prod(1), own.prod(1) + other.prod(1) - shared)
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def _curve(right: np.ndarray, counted: np.ndarray, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision at RECALLS and the final recall, of detections (T, n) by descending score."""
    hits, all_counted = right.cumsum(1, dtype=np.float64), counted.cumsum(1, dtype=np.float64)
    recall = hits / objects
    precision = hits / (all_counted + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.concatenate([precision, np.zeros((len(right), 1))], 1)
    places = [np.searchsorted(row, RECALLS) for row in recall]
    read = np.stack([row[place] for row, place in zip(precision, places, strict=True)])
    return read, recall[:, -1] if recall.shape[1] else np.zeros(len(right))


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
