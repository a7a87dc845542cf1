"""Find the images of every class in a folder, for training and validation, without opening them.

PATH/train/CLASS/picture.jpg and PATH/val/CLASS/picture.jpg, or PATH/CLASS/picture.jpg, which is split: the
1st, 6th, 11th, ... image of every class, in the order of their names, is used for validation.
"""

import os
import stat
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from cbam.data.decode import shown
from cbam.errors import DataError, InputError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VAL_NAMES = ("val", "validation", "valid", "test")
EVERY = 5

Classes = dict[str, list[str]]  # name of a class -> paths of its images, both in order


def find_images(path: str | os.PathLike) -> tuple[Classes, Classes, list[str]]:
    """The training and the validation images under `path`, and notes for the user.

    Raises:
        DataError: no such folder, no images, an empty class, fewer than two classes, or classes that
            differ between training and validation.
    """
    notes: list[str] = []
    root, splits = _layout(_folder(path), notes)
    if splits is None:
        train, val = _every_fifth(_scan(root, notes))
        notes.append(
            "no val folder: the 1st, 6th, 11th, ... image of every class, by name, is used for validation"
        )
    else:
        train, val = (_scan(folder, notes) for folder in splits)
        _check_same_classes(train, val, root)
    return train, val, notes


def find_unsplit(path: str | os.PathLike) -> tuple[Classes, list[str]] | None:
    """All images under `path`, with notes; None if there are folders of both splits.

    Raises:
        DataError: as in `find_images`, except that one image per class is enough.
    """
    notes: list[str] = []
    root, splits = _layout(_folder(path), notes)
    return None if splits else (_scan(root, notes), notes)


def class_roots(path: str | os.PathLike) -> list[Path]:
    """The folders under `path` that hold the class folders.

    Raises:
        DataError: as in `find_images`.
    """
    root, splits = _layout(_folder(path), [])
    return [*(splits or [root])]


def _folder(path: str | os.PathLike) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"image_folder takes the path of a folder, got {type(path).__name__}")
    try:
        kind = Path(path).stat().st_mode
    except FileNotFoundError as error:
        raise DataError(f"{shown(path)}: no such folder") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(f"{shown(path)}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISDIR(kind):
        raise DataError(f"{shown(path)}: a file; give the folder of the images (unpack an archive)")
    return Path(path)


def _layout(root: Path, notes: list[str]) -> tuple[Path, tuple[Path, Path] | None]:
    """The folder to read, and its two split folders if both exist.

    If `root` has a single folder that is `train` or holds the two splits, that one is read, as for an archive
    unpacked into a folder of its own name.
    """
    splits, others = _split_folders(root)
    if splits is None and len(others) == 1:
        inner = _split_folders(others[0])[0]
        if inner or others[0].name.lower() == "train":
            notes.append(f"read: {shown(others[0].name)}")
            return others[0], inner
    if splits is None:
        _refuse_half(others, root)
    elif others:
        notes.append(f"not read: {_some([shown(folder.name) for folder in others])}")
    return root, splits


def _refuse_half(folders: Sequence[Path], root: Path) -> None:
    """Refuse to read `train` and a split with an unknown name as two classes.

    Splits hold only folders; a class with such a name, for example of trains, holds images.
    """
    for folder in folders:
        if folder.name.lower() not in ("train", "training", *VAL_NAMES):
            continue
        inside = [entry for entry in _entries(folder) if not entry.name.startswith(".")]
        if inside and all(map(_is_folder, inside)):
            raise DataError(
                f"{shown(root)}: {shown(folder.name)} holds only folders, as a split of a data set does, but "
                f"the other split was not found (folders: {_some([shown(f.name) for f in folders])}); "
                f"name the two train and {', '.join(VAL_NAMES[:-1])} or {VAL_NAMES[-1]}"
            )


def _split_folders(root: Path) -> tuple[tuple[Path, Path] | None, list[Path]]:
    """The two split folders, in any case, or None if one is missing; and the other folders."""
    folders = [root / entry.name for entry in _entries(root) if _is_folder(entry) and entry.name[0] != "."]
    named = {folder.name.lower(): folder for folder in folders}
    val = next((named[name] for name in VAL_NAMES if name in named), None)
    splits = (named["train"], val) if "train" in named and val else None
    return splits, [folder for folder in folders if folder not in (splits or ())]


def _scan(folder: Path, notes: list[str]) -> Classes:
    """The class folders of `folder` and their images; adds what was left out to `notes`."""
    left_out: Counter[str] = Counter()
    classes: Classes = {}
    for entry in _entries(folder):
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif _is_folder(entry):
            classes[entry.name] = _pictures(entry.path, left_out)
        else:
            left_out["not in a class folder"] += 1
    _check_classes(classes, folder)
    if left_out:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        notes.append(f"{shown(folder.name)}: left out {counts}")
    return classes


def _pictures(top: str, left_out: Counter[str]) -> list[str]:
    """The sorted paths of the images under `top`. Links are followed, but each folder is read once."""
    seen: set[tuple[int, int]] = set()
    found: list[str] = []
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        entries, identity = _entries(folder), _identity(folder)
        if identity in seen:
            left_out["link to a folder already read"] += 1
            continue
        seen.add(identity)
        for entry in entries:
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif _is_folder(entry):
                waiting.append(entry.path)
            elif not entry.name.lower().endswith(EXTENSIONS):
                left_out[f"with ending {shown(Path(entry.name).suffix) or 'none'}"] += 1
            elif not _is_file(entry):
                left_out["broken link or not a regular file"] += 1
            else:
                found.append(entry.path)
    return sorted(found)


def _entries(folder: str | os.PathLike) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{shown(folder)}: {error.strerror or error}") from error


def _identity(folder: str) -> tuple[int, int]:
    state = Path(folder).stat()
    return state.st_dev, state.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # for example a link to itself
        return False


def _is_file(entry: os.DirEntry) -> bool:
    """From the directory listing: a stat for each of a million files takes minutes on a network disk."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _check_classes(classes: Classes, folder: Path) -> None:
    where = shown(folder)
    if not any(classes.values()):
        files = (shown(Path(top) / name) for top, _, names in os.walk(folder) for name in sorted(names))
        first = ", ".join(islice(files, 5))
        found = f"the first files there: {first}" if first else "it holds no files"
        raise DataError(f"{where}: no images in class folders ({', '.join(EXTENSIONS)}); {found}")
    empty = [shown(name) for name, paths in classes.items() if not paths]
    if empty:
        raise DataError(f"{where}: no images in class {_some(empty)}; fill the folder or remove it")
    if len(classes) < 2:
        raise DataError(f"{where}: only one class ({shown(next(iter(classes)))}); expected two or more")


def _check_same_classes(train: Classes, val: Classes, root: Path) -> None:
    if set(train) != set(val):
        only = [
            _some([shown(c) for c in sorted(a - b)])
            for a, b in ((set(train), set(val)), (set(val), set(train)))
        ]
        raise DataError(
            f"{shown(root)}: training and validation have different classes; "
            f"only in training: {only[0]}; only in validation: {only[1]}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


def _every_fifth(classes: Classes) -> tuple[Classes, Classes]:
    single = [shown(name) for name, paths in classes.items() if len(paths) < 2]
    if single:
        raise DataError(f"only one image in class {_some(single)}; training and validation need two or more")
    train = {name: [p for i, p in enumerate(paths) if i % EVERY] for name, paths in classes.items()}
    return train, {name: paths[::EVERY] for name, paths in classes.items()}
