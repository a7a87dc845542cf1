"""A folder of pictures -> a training and a validation set.

Training pictures: a random-resized crop (8 to 100 % of the area, 3:4 to 4:3) and a flip.
Validation pictures: short side to 256/224 of the network's input, then the centre.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cbam.data.decode import decode_bytes, header_of, not_an_image, read, shown
from cbam.data.images import MAX_SEED, UNKNOWN_BOX, Images, check_int, draws
from cbam.data.scan import Classes, find_pictures
from cbam.errors import DataError, MissingExtraError

PEEKS = 20_000  # headers read of so many pictures at the start; all the others as they come
TINY, NARROW = 10, 10  # pixels on the short side; times as long as wide

_log = logging.getLogger("cbam")


def image_folder(
    path: str | os.PathLike, *, size: int | None = None, unreadable: int | None = None
) -> tuple[Images, Images]:
    """The training and the validation set of a folder of pictures, one folder per class.

    `path` holds `train` and one of `val`, `validation`, `valid`, `test`; or it holds the class folders, and
    of every class the 1st, 6th, 11th, ... picture by name validates. Class folders may have folders
    inside. Hidden files and files without the ending of a picture are left out and counted in `notes`.

    Animations, of which the first frame is taken, and tiny or very narrow pictures are counted there too.

    A training picture that cannot be read is named once and replaced by the next of its class, until there
    are too many. In validation it is an error, for the set would silently be another one.

    Args:
        size: side of the square that the network gets. None: the median short side of the training pictures
            (200 of them, evenly spaced) to the nearest multiple of 32, but 32 to 224.
        unreadable: number of training pictures that may be unreadable. None: 0.1 % of them, but 1 to 100.

    Raises:
        DataError: no such folder, no pictures, an empty class, fewer than two classes, classes that differ
            between training and validation, a broken validation picture, too many broken training pictures.
    """
    if size is not None:
        size = check_int("size", size, 8, 4096)
    if unreadable is not None:
        unreadable = check_int("unreadable", unreadable, 0, MAX_SEED)
    train, val, notes = find_pictures(path)
    if size is None:
        size = _input_size(train, notes)
    name = shown(Path(path).resolve().name) or "images"
    return _Train(name, train, size, notes, unreadable), _Val(name, val, size, [])


class _Folder(Images):
    """Pictures of class folders."""

    def __init__(self, name: str, classes: Classes, size: int, notes: Sequence[str]) -> None:
        try:
            import torchvision  # noqa: F401
        except ImportError as error:
            raise MissingExtraError.of("image folders", "vision") from error
        targets = [label for label, paths in enumerate(classes.values()) for _ in paths]
        super().__init__(name, [shown(c) for c in classes], targets, size=size, notes=notes)
        self._paths = [path for paths in classes.values() for path in paths]

    def _where(self, index: int) -> str:
        return f"{shown(self._paths[index])} (class {self.classes[self.targets[index]]}, index {index})"

    def _picture(self, index: int) -> Tensor:
        """uint8 (3, H, W). A disk that does not answer is asked three times."""
        for pause in (0.05, 0.2, None):
            try:
                return decode_bytes(read(self._paths[index]), self._where(index))
            except OSError as error:
                if pause is None:
                    raise DataError(f"{self._where(index)}: {error.strerror or error}") from error
                time.sleep(pause)
        raise AssertionError

    def _peek(self, split: str) -> Iterator[tuple[int, str]]:
        """Index and message of the files whose first bytes show that they are no pictures.

        What is a picture and odd is counted, and then told in `notes`.
        """
        looked_at, odd = range(0, len(self), -(-len(self) // PEEKS)), _Odd()
        for index in looked_at:
            try:
                with Path(self._paths[index]).open("rb", buffering=0) as file:
                    fault = not_an_image(file.read(16))
            except OSError as error:
                fault = error.strerror or str(error)
            if fault:
                yield index, f"{self._where(index)}: {fault}"
            else:
                odd.look(self._paths[index])
        of = "" if len(looked_at) == len(self) else f" (of {len(looked_at)} that were looked at)"
        self.notes += [f"{split}: {line}{of}" for line in odd.told()]


class _Odd:
    """Counts the pictures that are read, but may not be what was meant; the first of each kind is named."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def look(self, path: str) -> None:
        header = header_of(path)
        if header is None:
            return
        short, long = sorted((header.height, header.width))
        if header.animated:
            self._found.setdefault("with several frames, of which the first is taken", []).append(path)
        if short < TINY or long > NARROW * short:
            kind = f"below {TINY} pixels on a side, or more than {NARROW} times as long as wide"
            self._found.setdefault(kind, []).append(path)

    def told(self) -> list[str]:
        return [
            f"{len(paths)} picture{'s' * (len(paths) > 1)} {kind}; the first: {shown(paths[0])}"
            for kind, paths in self._found.items()
        ]


class _Val(_Folder):
    def __init__(self, name: str, classes: Classes, size: int, notes: Sequence[str]) -> None:
        super().__init__(name, classes, size, notes)
        broken = list(self._peek("validation"))
        if broken:
            raise DataError(
                f"validation pictures that cannot be read: {len(broken)}, the first: {broken[0][1]}"
            )

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        return centre(self._picture(index), self.size), UNKNOWN_BOX


class _Train(_Folder):
    """`_broken` marks unreadable pictures in memory that the loader's workers share."""

    def __init__(
        self, name: str, classes: Classes, size: int, notes: Sequence[str], unreadable: int | None
    ) -> None:
        super().__init__(name, classes, size, notes)
        self._allowed = min(100, max(1, len(self) // 1000)) if unreadable is None else unreadable
        self._broken = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        for index, message in self._peek("training"):
            self._mark(index, message)

    @property
    def unreadable(self) -> list[str]:
        return [shown(self._paths[i]) for i in self._broken.nonzero().flatten().tolist()]

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        picture = self._readable(index)
        return augment(picture, self.size, draws("augmentation", self.seed, epoch, index)), UNKNOWN_BOX

    def whole(self, index: int) -> Tensor:
        from torchvision.transforms.v2 import functional as tv

        picture = self._readable(index)
        side = min(picture.shape[1:])
        return tv.resize(tv.center_crop(picture, [side, side]), [self.size, self.size], antialias=True)

    def _readable(self, index: int) -> Tensor:
        """The picture, or the next readable one of its class, the first following the last."""
        for other in self._candidates(index):
            if self._broken[other]:
                continue
            try:
                return self._picture(other)
            except DataError as error:
                self._mark(other, str(error))
        raise DataError(f"class {self.classes[self.targets[index]]} has no readable picture")

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        first = self.targets.index(self.targets[index])  # the targets are in order
        stop = first + self.targets.count(self.targets[index])
        yield from (*range(index + 1, stop), *range(first, index))

    def _mark(self, index: int, message: str) -> None:
        self._broken[index] = True
        count = int(self._broken.sum())
        if count > self._allowed:
            raise DataError(
                f"{count} of {len(self)} training pictures cannot be read, {self._allowed} may be; "
                f"the last: {message}"
            )
        _log.warning("unreadable, replaced by the next picture of its class: %s", message)


def augment(picture: Tensor, size: int, random: np.random.Generator) -> Tensor:
    """A random-resized crop and a flip: uint8 (3, H, W) -> uint8 (3, size, size)."""
    from torchvision.transforms.v2 import functional as tv

    top, left, height, width = random_crop(picture.shape[1], picture.shape[2], random)
    flip = random.random() < 0.5
    crop = tv.resized_crop(picture, top, left, height, width, [size, size], antialias=True)
    return tv.horizontal_flip(crop) if flip else crop


def random_crop(height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height, width of a crop as torchvision's RandomResizedCrop draws it."""
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


def centre(picture: Tensor, size: int) -> Tensor:
    """Short side to 256/224 of `size`, then the centre: uint8 (3, H, W) -> uint8 (3, size, size)."""
    from torchvision.transforms.v2 import functional as tv

    height, width = picture.shape[1:]
    limit = 4 * min(height, width)  # of 1 x 20000 pixels nothing enormous is made
    picture = tv.center_crop(picture, [min(height, limit), min(width, limit)])
    return tv.center_crop(tv.resize(picture, [round(size * 256 / 224)], antialias=True), [size, size])


def _input_size(classes: Classes, notes: list[str]) -> int:
    paths = [path for own in classes.values() for path in own]
    headers = [header_of(paths[i]) for i in range(0, len(paths), -(-len(paths) // 200))]
    short = float(np.median([min(header.height, header.width) for header in headers if header] or [224]))
    size = int(min(224, max(32, round(short / 32) * 32)))
    notes.append(f"the network gets {size} x {size} pixels (median short side of the pictures: {short:g})")
    return size
