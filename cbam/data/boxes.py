"""Images with boxes, and faults found in them; the COCO and VOC readers produce both.

Boxes are x0 y0 x1 y1 in pixels, ends exclusive: a box over the whole image is 0 0 W H. Labels start at 1,
because detectors reserve 0 for the background.

The EXIF orientation is applied to an image and to its boxes. Annotations are taken to refer to the pixels as
stored, unless the size they state matches only the upright image.
"""

import copy
import hashlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cbam.data.augment import augment_boxed, check_augmentation
from cbam.data.decode import decode_turned, read, shown
from cbam.data.images import MAX_SEED, check_int, draws
from cbam.errors import DataError

RESOLUTION = 0.01  # pixels; COCO's files have two decimals
SHOWN = 3  # faults quoted in one message
PER_BOX = ("boxes", "labels", "area", "crowd", "difficult")

CLIPPED = "a box extends outside its image: clipped"
OUTSIDE = "a box lies outside its image: dropped"
DEGENERATE = "a box has no width or no height: dropped"


@dataclass(frozen=True)
class Finding:
    """One fault of a data set.

    Args:
        where: the file, with line and column if it is a text file; empty if `what` already says it.
        what: description of the fault.
        counted: kind of fault, for one that the readers repair and count; empty if they reject it.
        times: number of occurrences.
    """

    where: str
    what: str
    counted: str = ""
    times: int = 1

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class Picture(NamedTuple):
    """An image file; height and width as annotated, or 0 if the boxes refer to the upright image."""

    id: int
    name: str
    path: str
    height: int
    width: int


class Thing(NamedTuple):
    """An annotated object; `image` is the index of its image."""

    image: int
    box: tuple[float, float, float, float]
    label: int
    area: float
    crowd: bool = False
    difficult: bool = False


class BoxedImages(Dataset):
    """Images of their own sizes, each with any number of labelled boxes.

    Args:
        name: name of the set, for reports.
        classes: class names; label k is `classes[k - 1]`.
        pictures: the images, in order.
        things: their objects, in any order; boxes lie inside the image and are not empty.
        notes: counts of oddities, shown once.
        rules: scoring protocol, "voc" or "coco".
    """

    size = None  # each image has its own

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        pictures: Sequence[Picture],
        things: Iterable[Thing],
        notes: Sequence[str] = (),
        *,
        rules: str = "voc",
    ) -> None:
        self.name, self.classes, self.pictures = name, list(classes), list(pictures)
        self.notes, self.rules = list(notes), rules
        self.seed, self.augmentation = 0, "none"
        # Worker processes share flat arrays; a million small objects would be copied into each.
        ordered = sorted(things, key=lambda thing: thing.image)
        self._starts = np.searchsorted([t.image for t in ordered], np.arange(len(self.pictures) + 1))
        self._boxes = np.array([t.box for t in ordered], np.float64).reshape(-1, 4)
        self._labels = torch.tensor([t.label for t in ordered], dtype=torch.int64)
        self._areas = torch.tensor([t.area for t in ordered], dtype=torch.float32)
        self._crowd = torch.tensor([t.crowd for t in ordered], dtype=torch.bool)
        self._difficult = torch.tensor([t.difficult for t in ordered], dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Sample `index`, or (epoch, index), which the loader's sampler yields.

        Returns:
            image: uint8 (3, H, W), upright; boxes: float32 (N, 4); labels: int64 (N,), from 1;
            area: float32 (N,), square pixels, of the mask if there is one; crowd, difficult: bool (N,);
            image_id: int; index: int. N may be 0. A sample of an augmented set is a function of (seed,
            epoch, index); a bare index means epoch 0.

        Raises:
            DataError: the image cannot be read, or its size is not the annotated one.
        """
        epoch, index = map(operator.index, key if isinstance(key, tuple) else (0, key))
        if epoch < 0 or not 0 <= index < len(self):
            raise IndexError(f"epoch {epoch}, index {index}: {self.name} has {len(self)} images")
        picture = self.pictures[index]
        own = slice(int(self._starts[index]), int(self._starts[index + 1]))
        image, boxes = _upright(picture, self._boxes[own], f"{shown(picture.path)} (image {picture.id})")
        sample = {
            "image": image,
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "labels": self._labels[own],
            "area": self._areas[own],
            "crowd": self._crowd[own],
            "difficult": self._difficult[own],
            "image_id": picture.id,
            "index": index,
        }
        if self.augmentation == "none":
            return sample
        return augment_boxed(sample, self.augmentation, draws("augmentation", self.seed, epoch, index))

    @staticmethod
    def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate a batch: image, a list; target, a list of dicts of the per-box entries; index (N,)."""
        return {
            "image": [sample["image"] for sample in samples],
            "target": [{name: sample[name] for name in PER_BOX} for sample in samples],
            "index": torch.tensor([sample["index"] for sample in samples]),
        }

    def augmented(self, how: str) -> "BoxedImages":
        """The same set with random augmentation, for training: see `cbam.data.augment`."""
        return self._with(augmentation=check_augmentation(how))

    def seeded(self, seed: int) -> "BoxedImages":
        """The same set with another seed for its random choices."""
        return self._with(seed=check_int("seed", seed, 0, MAX_SEED))

    def _with(self, **values: Any) -> "BoxedImages":
        other = copy.copy(self)
        vars(other).update(values)
        return other

    def loaded(self, batches: Any) -> Any:
        """None: the DataLoader reads the samples."""
        return None

    @property
    def all_boxes(self) -> np.ndarray:
        """All annotated boxes, in the order of the images: float64 (N, 4)."""
        return self._boxes

    def digest(self) -> str:
        """SHA-256 of all objects: image, box, label, crowd and difficult."""
        whole = hashlib.sha256()
        for values in (self._starts, self._boxes, self._labels, self._crowd, self._difficult):
            whole.update(np.ascontiguousarray(values).tobytes())
        return whole.hexdigest()

    def inner_name(self, index: int) -> str:
        """File name of an image, independent of where the set is stored."""
        return self.pictures[index].name

    @property
    def scored(self) -> int:
        """Number of objects that count in scoring: all but crowds and difficult ones."""
        return int((~(self._crowd | self._difficult)).sum())

    def count(self, index: int) -> int:
        """Number of objects in image `index`."""
        return int(self._starts[index + 1] - self._starts[index])

    def labels(self, index: int) -> list[int]:
        """The distinct labels in image `index`, sorted, without those of crowds."""
        own = slice(int(self._starts[index]), int(self._starts[index + 1]))
        return self._labels[own][~self._crowd[own]].unique().tolist()

    def with_objects(self) -> "BoxedImages":
        """Keep the images that have an object. Common for training, never done for evaluation."""
        return self._chosen([i for i in range(len(self)) if self.count(i)], "without objects left out")

    def without_crowds(self) -> "BoxedImages":
        """The same images without crowd boxes, which are not single objects to learn."""
        things = [self._thing(j, i) for i in range(len(self)) for j in self._range(i) if not self._crowd[j]]
        left_out = len(self._labels) - len(things)
        return self._made(self.pictures, things, f"{left_out} crowd boxes left out" if left_out else "")

    def subset(self, n: int) -> "BoxedImages":
        """n evenly spaced images, or all if there are fewer; always the same ones."""
        n = min(check_int("n", n, 1, MAX_SEED), len(self))
        return self._chosen([i * len(self) // n for i in range(n)], "left out, the others evenly spaced")

    def _chosen(self, indices: Sequence[int], why: str) -> "BoxedImages":
        things = [self._thing(j, new) for new, i in enumerate(indices) for j in self._range(i)]
        left_out = len(self) - len(indices)
        note = f"{left_out} of {len(self)} images {why}" if left_out else ""
        return self._made([self.pictures[i] for i in indices], things, note)

    def _made(self, pictures: Sequence[Picture], things: Iterable[Thing], note: str) -> "BoxedImages":
        notes = [*self.notes, *([note] if note else [])]
        made = BoxedImages(self.name, self.classes, pictures, things, notes, rules=self.rules)
        return made._with(seed=self.seed, augmentation=self.augmentation)

    def _range(self, index: int) -> range:
        return range(self._starts[index], self._starts[index + 1])

    def _thing(self, j: int, image: int) -> Thing:
        fields = (self._labels, self._areas, self._crowd, self._difficult)
        return Thing(image, tuple(self._boxes[j].tolist()), *(field[j].item() for field in fields))  # type: ignore[arg-type]


def clip(
    box: tuple[float, float, float, float], height: int, width: int
) -> tuple[tuple[float, float, float, float] | None, str]:
    """Clip a finite box to its image. Returns the box, None if nothing is left, and the repair made or ""."""
    x0, y0, x1, y1 = box
    if x1 - x0 < RESOLUTION or y1 - y0 < RESOLUTION:
        return None, DEGENERATE
    inside = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if inside[2] - inside[0] < RESOLUTION or inside[3] - inside[1] < RESOLUTION:
        return None, OUTSIDE
    moved = max(abs(a - b) for a, b in zip(box, inside, strict=True)) > RESOLUTION
    return inside, CLIPPED if moved else ""


def turned(boxes: np.ndarray, turn: int, height: int, width: int) -> np.ndarray:
    """Map boxes (N, 4) from the stored image, height x width, to the upright one; `turn` is EXIF's."""
    x0, y0, x1, y1 = boxes.T
    if turn in (2, 3, 7, 8):
        x0, x1 = width - x1, width - x0
    if turn in (3, 4, 6, 7):
        y0, y1 = height - y1, height - y0
    return np.stack((y0, x0, y1, x1) if turn >= 5 else (x0, y0, x1, y1), axis=1)


def accept(findings: Sequence[Finding], what: str) -> list[str]:
    """Summarise the faults that the reader repaired, one note for each kind.

    Raises:
        DataError: there are faults that it does not repair; the first few are quoted.
    """
    rejected = [finding for finding in findings if not finding.counted]
    if rejected:
        more = len(rejected) - SHOWN
        text = "; ".join(map(str, rejected[:SHOWN]))
        raise DataError(f"{text}; and {more} more, see `cbam data check {what}`" if more > 0 else text)
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.counted, []).append(finding)
    counts = {kind: sum(finding.times for finding in own) for kind, own in kinds.items()}
    often = {kind: "once" if count == 1 else f"{count} times" for kind, count in counts.items()}
    return [f"{often[kind]}: {kind}; the first: {own[0].where}" for kind, own in kinds.items()]


def _upright(picture: Picture, boxes: np.ndarray, where: str) -> tuple[Tensor, np.ndarray]:
    """The upright image, uint8 (3, H, W), and its boxes on it."""
    try:
        data = read(picture.path)
    except OSError as error:
        raise DataError(f"{where}: {error.strerror or error}") from error
    image, turn = decode_turned(data, where)
    height, width = image.shape[1:]
    stored = (width, height) if turn >= 5 else (height, width)
    if fault := size_fault(picture, stored, turn):
        raise DataError(f"{where}: {fault}")
    on_stored = (picture.height, picture.width) == stored
    return image, turned(boxes, turn, *stored) if on_stored else boxes


def size_fault(picture: Picture, stored: tuple[int, int], turn: int) -> str:
    """How the annotated size contradicts the size (height, width) as stored; "" if it does not."""
    stated = (picture.height, picture.width)
    upright = stored[::-1] if turn >= 5 else stored
    if stated in ((0, 0), stored, upright):
        return ""
    return (
        f"{stored[1]}x{stored[0]} pixels, but its annotation says {stated[1]}x{stated[0]}, "
        "so its boxes cannot be used"
    )


def image_files(folder: str | Path) -> set[str]:
    """The names of the entries directly in `folder`."""
    try:
        return {entry.name for entry in Path(folder).iterdir()}
    except OSError as error:
        raise DataError(f"{shown(folder)}: {error.strerror or error}") from error


def is_file(path: Path) -> bool:
    """Whether `path` is a file; False also for a name that cannot exist."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False
