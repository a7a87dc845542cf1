"""A folder of pictures -> a training and a validation set.

PATH/train/CLASS/picture.jpg beside PATH/val/CLASS/picture.jpg, or PATH/CLASS/picture.jpg, which is split:
the 1st, 6th, 11th, ... picture of every class, in the order of their names, validate.

Training pictures: a random-resized crop (8 to 100 % of the area, 3:4 to 4:3) and a flip.
Validation pictures: short side to 256/224 of the network's input, then the centre.
"""

import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cbam.data.decode import decode_bytes, not_an_image, read, shown, size_of
from cbam.data.images import MAX_SEED, UNKNOWN_BOX, Images, check_int, draws
from cbam.errors import DataError, InputError, MissingExtraError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VAL_NAMES = ("val", "validation", "valid", "test")
EVERY = 5
PEEKS = 20_000  # first bytes read of so many pictures at the start; all the others as they come

_log = logging.getLogger("cbam")


def image_folder(
    path: str | os.PathLike, *, size: int | None = None, unreadable: int | None = None
) -> tuple[Images, Images]:
    """The training and the validation set of a folder of pictures, one folder per class.

    `path` holds `train` and one of `val`, `validation`, `valid`, `test`; or it holds the class folders, and
    of every class the 1st, 6th, 11th, ... picture by name validates. Class folders may have folders
    inside. Hidden files and files without the ending of a picture are left out and counted in `notes`.

    A training picture that cannot be read is named once and replaced by the next of its class, until there
    are too many. In validation it is an error, for the set would silently be another one.

    Args:
        size: side of the square that the network gets. None: 224, or the median short side of the training
            pictures (200 of them, evenly spaced) to the nearest multiple of 32, if that is smaller.
        unreadable: number of training pictures that may be unreadable. None: 0.1 % of them, but 1 to 100.

    Raises:
        DataError: no such folder, no pictures, an empty class, fewer than two classes, classes that differ
            between training and validation, a broken validation picture, too many broken training pictures.
    """
    if size is not None:
        size = check_int("size", size, 8, 4096)
    if unreadable is not None:
        unreadable = check_int("unreadable", unreadable, 0, MAX_SEED)
    root = _folder(path)
    name = shown(root.resolve().name) or "images"
    notes: list[str] = []
    root, splits = _layout(root, notes)
    if splits is None:
        train, val = _every_fifth(_scan(root, notes))
        notes.append("no val folder: of every class the 1st, 6th, 11th, ... picture by name validates")
    else:
        train, val = (_scan(folder, notes) for folder in splits)
        _check_same_classes(train, val, root)
    if size is None:
        size = _input_size(train, notes)
    return _Train(name, train, size, notes, unreadable), _Val(name, val, size, [])


_Classes = dict[str, list[str]]  # name of a class -> paths of its pictures, both in order


class _Folder(Images):
    """Pictures of class folders."""

    def __init__(self, name: str, classes: _Classes, size: int, notes: Sequence[str]) -> None:
        try:
            import torchvision  # noqa: F401
        except ImportError as error:
            raise MissingExtraError.of("image folders", "vision") from error
        targets = [label for label, paths in enumerate(classes.values()) for _ in paths]
        super().__init__(name, [shown(c) for c in classes], targets, size=size, notes=notes)
        self._paths = [path for paths in classes.values() for path in paths]

    def _picture(self, index: int) -> Tensor:
        """uint8 (3, H, W). A disk that does not answer is asked three times."""
        path = self._paths[index]
        where = f"{shown(path)} (class {self.classes[self.targets[index]]}, index {index})"
        for pause in (0.05, 0.2, None):
            try:
                return decode_bytes(read(path), where)
            except OSError as error:
                if pause is None:
                    raise DataError(f"{where}: {error.strerror or error}") from error
                time.sleep(pause)
        raise AssertionError

    def _peek(self) -> Iterator[tuple[int, str]]:
        """Index and message of the files whose first bytes show that they are no pictures."""
        stride = -(-len(self) // PEEKS)
        for index in range(0, len(self), stride):
            path = self._paths[index]
            try:
                with Path(path).open("rb", buffering=0) as file:
                    fault = not_an_image(file.read(16))
            except OSError as error:
                fault = error.strerror or str(error)
            if fault:
                yield (
                    index,
                    f"{shown(path)} (class {self.classes[self.targets[index]]}, index {index}): {fault}",
                )


class _Val(_Folder):
    def __init__(self, name: str, classes: _Classes, size: int, notes: Sequence[str]) -> None:
        super().__init__(name, classes, size, notes)
        broken = list(self._peek())
        if broken:
            raise DataError(f"{len(broken)} validation pictures cannot be read, the first: {broken[0][1]}")

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        return centre(self._picture(index), self.size), UNKNOWN_BOX


class _Train(_Folder):
    """`_broken` marks unreadable pictures in memory that the loader's workers share."""

    def __init__(
        self, name: str, classes: _Classes, size: int, notes: Sequence[str], unreadable: int | None
    ) -> None:
        super().__init__(name, classes, size, notes)
        self._allowed = min(100, max(1, len(self) // 1000)) if unreadable is None else unreadable
        self._broken = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        for index, message in self._peek():
            self._mark(index, message)

    @property
    def unreadable(self) -> list[str]:
        return [shown(self._paths[i]) for i in self._broken.nonzero().flatten().tolist()]

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        picture = self._readable(index)
        return augment(picture, self.size, draws("augmentation", self.seed, epoch, index)), UNKNOWN_BOX

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


def _folder(path: str | os.PathLike) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"image_folder takes the path of a folder, got {type(path).__name__}")
    try:
        kind = Path(path).stat().st_mode
    except FileNotFoundError as error:
        raise DataError(f"{shown(path)}: no such folder") from error
    except (OSError, ValueError) as error:  # a ValueError is a zero byte in the name
        raise DataError(f"{shown(path)}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISDIR(kind):
        raise DataError(f"{shown(path)}: a file; give the folder that holds the pictures (unpack an archive)")
    return Path(path)


def _layout(root: Path, notes: list[str]) -> tuple[Path, tuple[Path, Path] | None]:
    """The folder to read, and its folders of the two splits where there are both.

    A single folder inside `root` is entered if it is `train` or holds the two splits, as in an archive
    unpacked into a folder of its own name.
    """
    splits, others = _split_folders(root)
    if splits is None and len(others) == 1:
        inner = _split_folders(others[0])[0]
        if inner or others[0].name.lower() == "train":
            return others[0], inner
    if splits and others:
        notes.append(f"not read: {_some([shown(folder.name) for folder in others])}")
    return root, splits


def _split_folders(root: Path) -> tuple[tuple[Path, Path] | None, list[Path]]:
    """The folders of the two splits, whatever their case, None where there are not both; the others."""
    folders = [root / entry.name for entry in _entries(root) if _is_folder(entry) and entry.name[0] != "."]
    named = {folder.name.lower(): folder for folder in folders}
    val = next((named[name] for name in VAL_NAMES if name in named), None)
    splits = (named["train"], val) if "train" in named and val else None
    return splits, [folder for folder in folders if folder not in (splits or ())]


def _scan(folder: Path, notes: list[str]) -> _Classes:
    """Every class folder of `folder` and its pictures; adds to `notes` what was left out."""
    left_out: Counter[str] = Counter()
    classes: _Classes = {}
    for entry in _entries(folder):
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif _is_folder(entry):
            classes[entry.name] = _pictures(entry.path, left_out)
        else:
            left_out["beside the class folders"] += 1
    _check_classes(classes, folder)
    if left_out:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        notes.append(f"{shown(folder.name)}: left out {counts}")
    return classes


def _pictures(top: str, left_out: Counter[str]) -> list[str]:
    """The paths of the pictures under `top`, in order. Links are followed, to each folder once."""
    seen: set[tuple[int, int]] = set()
    found: list[str] = []
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        state = Path(folder).stat()
        if (state.st_dev, state.st_ino) in seen:
            left_out["link to a folder already read"] += 1
            continue
        seen.add((state.st_dev, state.st_ino))
        for entry in _entries(folder):
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif _is_folder(entry):
                waiting.append(entry.path)
            elif not entry.name.lower().endswith(EXTENSIONS):
                left_out[f"with ending {shown(Path(entry.name).suffix) or 'none'}"] += 1
            elif not Path(entry.path).is_file():
                left_out["broken link or no regular file"] += 1
            else:
                found.append(entry.path)
    return sorted(found)


def _entries(folder: str | os.PathLike) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{shown(folder)}: {error.strerror or error}") from error


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _check_classes(classes: _Classes, folder: Path) -> None:
    where = shown(folder)
    if not any(classes.values()):
        files = [shown(Path(top) / name) for top, _, names in os.walk(folder) for name in sorted(names)][:5]
        found = "the first files there: " + ", ".join(files) if files else "it holds no files"
        raise DataError(f"{where}: no pictures in class folders ({', '.join(EXTENSIONS)}); {found}")
    empty = [shown(name) for name, paths in classes.items() if not paths]
    if empty:
        raise DataError(f"{where}: no pictures in class {_some(empty)}; fill the folder or remove it")
    if len(classes) < 2:
        raise DataError(f"{where}: one class only ({shown(next(iter(classes)))}); there must be two or more")


def _check_same_classes(train: _Classes, val: _Classes, root: Path) -> None:
    if set(train) != set(val):
        only = [
            _some([shown(c) for c in sorted(a - b)])
            for a, b in ((set(train), set(val)), (set(val), set(train)))
        ]
        raise DataError(
            f"{shown(root)}: training and validation hold different classes; "
            f"only in training: {only[0]}; only in validation: {only[1]}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


def _every_fifth(classes: _Classes) -> tuple[_Classes, _Classes]:
    single = [shown(name) for name, paths in classes.items() if len(paths) < 2]
    if single:
        raise DataError(f"one picture only in class {_some(single)}; to train and to validate takes two")
    train = {name: [p for i, p in enumerate(paths) if i % EVERY] for name, paths in classes.items()}
    return train, {name: paths[::EVERY] for name, paths in classes.items()}


def _input_size(classes: _Classes, notes: list[str]) -> int:
    paths = [path for own in classes.values() for path in own]
    sizes = [size_of(paths[i]) for i in range(0, len(paths), -(-len(paths) // 200))]
    short = float(np.median([min(size) for size in sizes if size] or [224]))
    size = int(min(224, max(32, round(short / 32) * 32)))
    notes.append(f"the network gets {size} x {size} pixels (median short side of the pictures: {short:g})")
    return size
