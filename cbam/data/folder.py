"""Training and validation sets from a folder of images with one folder per class."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cbam.data.decode import header_of, not_an_image, read, shown
from cbam.data.images import MAX_SEED, Images, check_int
from cbam.data.pictures import Training, Validation
from cbam.data.scan import Classes, find_images, find_unsplit

PEEKS = 20_000  # number of headers read at the start; the other images are checked when they are read
TINY, NARROW = 10, 10  # short side in pixels; ratio of the sides


def image_folder(
    path: str | os.PathLike, *, size: int | None = None, unreadable: int | None = None, exif: bool = True
) -> tuple[Images, Images]:
    """Read the training and the validation set of a folder of images with one folder per class.

    `path` holds `train` and one of `val`, `validation`, `valid`, `test`; or it holds the class folders, and
    the 1st, 6th, 11th, ... image of every class, by name, is used for validation. Class folders may be
    nested. Hidden files and files without an image extension are left out and counted in `notes`.

    Animations, of which only the first frame is used, and tiny or very narrow images are counted there too.

    A training image that cannot be read is reported once and replaced by the next of its class, until there
    are too many. In validation it is an error, because the set would silently change.

    Args:
        size: side of the square network input. None: the median short side of the training images (200 of
            them, evenly spaced), rounded to a multiple of 32 and limited to 32 to 224.
        unreadable: number of training images that may be unreadable. None: 0.1 % of them, but 1 to 100.
        exif: whether to apply the EXIF orientation; torchvision's ImageFolder, with which published numbers
            were measured, does not.

    Raises:
        DataError: no such folder, no images, an empty class, fewer than two classes, classes that differ
            between training and validation, a broken validation image, too many broken training images.
    """
    if size is not None:
        size = check_int("size", size, 8, 4096)
    if unreadable is not None:
        unreadable = check_int("unreadable", unreadable, 0, MAX_SEED)
    train, val, notes = find_images(path)
    if size is None:
        size = _input_size(train, notes)
    name = _name(path)
    sources = _Files(train, "training"), _Files(val, "validation")
    train_set = Training(name, sources[0], size, notes, unreadable, exif=exif)
    return train_set, Validation(name, sources[1], size, exif=exif)


def evaluation_folder(
    path: str | os.PathLike, *, size: int | None = None, exif: bool = True
) -> Validation | None:
    """Read all images of a folder of classes for evaluation; None if `train` and `val` are in it.

    Args and errors: see `image_folder`.
    """
    if size is not None:
        size = check_int("size", size, 8, 4096)
    found = find_unsplit(path)
    if found is None:
        return None
    classes, notes = found
    if size is None:
        size = _input_size(classes, notes)
    return Validation(_name(path), _Files(classes, "evaluation"), size, notes, exif=exif)


def _name(path: str | os.PathLike) -> str:
    return shown(Path(path).resolve().name) or "images"


class _Files:
    """The images of class folders; `notes` counts those that are readable but suspicious."""

    def __init__(self, classes: Classes, split: str) -> None:
        self.classes = [shown(name) for name in classes]
        self.targets = [label for label, paths in enumerate(classes.values()) for _ in paths]
        self.notes: list[str] = []
        self._paths = _Paths([path for paths in classes.values() for path in paths])
        # The common parent of the class folders, of which there are two or more. commonpath would normalise.
        first = [paths[0] for paths in classes.values()]
        self._root = os.path.commonprefix(first).rpartition(os.sep)[0]  # noqa: RUF071
        self._split = split

    def read(self, index: int) -> bytes:
        return read(self._paths[index])

    def name(self, index: int) -> str:
        return shown(self._paths[index])

    def inner_name(self, index: int) -> str:
        return self._paths[index][len(self._root) + 1 :]

    def faults(self) -> Iterator[tuple[int, str]]:
        """Yield the images whose first bytes show that they are not images."""
        inspected, odd = range(0, len(self._paths), -(-len(self._paths) // PEEKS)), _Odd()
        for index in inspected:
            try:
                with Path(self._paths[index]).open("rb", buffering=0) as file:
                    fault = not_an_image(file.read(16))
            except OSError as error:
                fault = error.strerror or str(error)
            if fault:
                yield index, fault
            else:
                odd.inspect(self._paths[index])
        of = "" if len(inspected) == len(self._paths) else f" (of {len(inspected)} inspected)"
        self.notes += [f"{self._split}: {line}{of}" for line in odd.summary()]


class _Paths:
    """Many paths in one block of memory.

    Forked workers share memory that is not written to, but Python updates the reference count of every string
    it reads: as strings, the names of ImageNet would take 160 MB in each worker.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


class _Odd:
    """Counts images that are readable but suspicious, with the first of each kind."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def inspect(self, path: str) -> None:
        header = header_of(path)
        if header is None:
            return
        short, long = sorted((header.height, header.width))
        if header.animated:
            self._found.setdefault("with several frames, of which only the first is used", []).append(path)
        if short < TINY or long > NARROW * short:
            kind = f"below {TINY} pixels on a side, or more than {NARROW} times as long as wide"
            self._found.setdefault(kind, []).append(path)

    def summary(self) -> list[str]:
        return [
            f"{len(paths)} image{'s' * (len(paths) > 1)} {kind}; the first: {shown(paths[0])}"
            for kind, paths in self._found.items()
        ]


def _input_size(classes: Classes, notes: list[str]) -> int:
    paths = [path for own in classes.values() for path in own]
    headers = [header_of(paths[i]) for i in range(0, len(paths), -(-len(paths) // 200))]
    short = float(np.median([min(header.height, header.width) for header in headers if header] or [224]))
    size = int(min(224, max(32, round(short / 32) * 32)))
    notes.append(f"network input: {size} x {size} pixels (median short side of the images: {short:g})")
    return size
