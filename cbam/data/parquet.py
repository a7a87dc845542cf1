"""ImageNet-1k, or any other image set, from Hugging Face's parquet files.

The files are read with the package `datasets`, which converts them once to Arrow files in its cache and maps
those into memory, so that any number of processes can read the images in any order.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cbam.data.decode import not_an_image, shown
from cbam.data.folder import evaluation_folder, image_folder
from cbam.data.images import Images, check_int
from cbam.data.pictures import Training, Validation
from cbam.data.scan import class_roots
from cbam.errors import ConfigError, DataError, MissingExtraError

TRAIN, VALIDATION = ("train",), ("validation", "val", "valid", "test")
PEEKS = 1000  # images whose first bytes are checked, evenly spaced


def picture_set(
    path: str | os.PathLike, *, size: int | None = None, exif: bool = True
) -> tuple[Images, Images]:
    """The training and the validation set of a folder, from parquet files if it has some.

    Args:
        size, exif: see `image_folder`.

    Raises:
        DataError: see `image_folder` and `parquet_images`.
    """
    if isinstance(path, (str, os.PathLike)) and has_parquet(path):
        return parquet_images(path, size=size, exif=exif)
    return image_folder(path, size=size, exif=exif)


def evaluation_set(
    path: str | os.PathLike, *, size: int | None = None, exif: bool = True
) -> Validation | None:
    """All images of a folder, for evaluation; None if the folder has a validation split of its own.

    Args and errors: see `image_folder`.
    """
    if isinstance(path, (str, os.PathLike)) and has_parquet(path):
        return None
    return evaluation_folder(path, size=size, exif=exif)


def check_output_folder(path: str | os.PathLike, folder: Path) -> None:
    """Refuse an output `folder` that would be read as a class of the images under `path`, or inside one.

    Raises:
        ConfigError: it would be. DataError: see `image_folder`.
    """
    if has_parquet(path):
        return
    for root in class_roots(path):
        if folder.resolve().is_relative_to(root.resolve()):
            inside = folder.resolve().relative_to(root.resolve())
            if not any(part.startswith(".") for part in inside.parts):
                raise ConfigError(f"{folder} is among the class folders of {path}: give another --out")


def parquet_images(
    path: str | os.PathLike, *, size: int | None = None, exif: bool = True
) -> tuple[Images, Images]:
    """The sets in `train-*.parquet` and `validation-*.parquet` under `path` or `path`/data.

    Their columns are `image` (the encoded file) and `label`, as in ILSVRC/imagenet-1k. `size` is the side of
    the square network input, by default 224.

    Raises:
        DataError: no such files, other columns, labels without names, a broken validation image.
        MissingExtraError: the package `datasets` is not installed.
    """
    size = 224 if size is None else check_int("size", size, 8, 4096)
    root = Path(path)
    train, val = parquet_rows(root)
    if train.classes != val.classes:
        raise DataError(f"{shown(root)}: training and validation have different classes")
    name = shown(root.resolve().name) or "parquet"
    return Training(name, train, size, [], exif=exif), Validation(name, val, size, exif=exif)


def has_parquet(path: str | os.PathLike) -> bool:
    """Whether the images of this folder are read from parquet files."""
    return bool(_files(Path(path), TRAIN))


def parquet_rows(root: Path) -> "tuple[_Rows, _Rows]":
    """The rows of the training and the validation set; errors as in `parquet_images`."""
    files = {"train": _files(root, TRAIN), "validation": _files(root, VALIDATION)}
    absent = [split for split, found in files.items() if not found]
    if absent:
        raise DataError(
            f"{shown(root)}: no {' and no '.join(absent)}-*.parquet, not in its folder data either"
        )
    train, val = (_Rows(rows, f"{shown(root)}, {split}") for split, rows in _load(root, files).items())
    return train, val


def _files(root: Path, names: tuple[str, ...]) -> list[str]:
    """The files of the first of these names that has any, so that test files do not join a validation set."""
    for name in names:
        try:
            found = [file for folder in (root, root / "data") for file in folder.glob(f"{name}-*.parquet")]
        except (OSError, ValueError):  # ValueError: a null byte in the name
            return []
        if found:
            return sorted(map(str, found))
    return []


def _load(root: Path, files: dict[str, list[str]]) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError.of("parquet files", "parquet") from error
    shown_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        # One by one: loaded together, all splits would get the class names of the first.
        return {
            split: datasets.load_dataset("parquet", data_files=found, split="train")
            for split, found in files.items()
        }
    except Exception as error:  # the error of a damaged file differs from version to version
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        raise DataError(f"{shown(root)}: the parquet files cannot be read ({reason})") from error
    finally:
        if shown_bars:
            datasets.enable_progress_bars()


class _Rows:
    """The rows of one split; `where` names them in messages."""

    def __init__(self, rows: Any, where: str) -> None:
        import datasets  # pyright: ignore[reportMissingImports]

        self.notes: list[str] = []
        self._where = where
        label = rows.features.get("label")
        if "image" not in rows.features or not isinstance(label, datasets.ClassLabel):
            raise DataError(
                f"{where}: expected the columns image and label, with class names; "
                f"found {', '.join(rows.features)}"
            )
        self.classes: list[str] = [shown(name) for name in label.names]
        # All at once: row by row takes a minute for ImageNet. A label may be null.
        self.targets: list[int] = rows["label"][:]
        known = range(len(self.classes))
        wrong = [i for i, target in enumerate(self.targets) if target not in known]
        if wrong:
            raise DataError(
                f"{where}: label {self.targets[wrong[0]]} in row {wrong[0]}, "
                f"expected 0 to {len(self.classes) - 1}"
            )
        self._rows = rows.cast_column("image", datasets.Image(decode=False)).select_columns("image")

    def read(self, index: int) -> bytes:
        image = self._rows[index]["image"]
        return (image and image["bytes"]) or b""  # either may be null

    def name(self, index: int) -> str:
        return f"{self._where} row {index}"

    def inner_name(self, index: int) -> str:
        return ""  # rows have none

    def faults(self) -> Iterator[tuple[int, str]]:
        for index in range(0, len(self.targets), -(-len(self.targets) // PEEKS)):
            fault = not_an_image(self.read(index)[:16])
            if fault:
                yield index, fault
