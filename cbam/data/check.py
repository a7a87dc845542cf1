"""Find all faults of a data set on disk: image folders, parquet files, COCO and VOC."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from cbam.data.boxed_folder import PARTS, differing, is_voc, voc_years
from cbam.data.boxes import Finding, Picture, is_file, size_fault
from cbam.data.coco import LISTS, CocoReader, pictures_of
from cbam.data.decode import decode_bytes, header_of, not_an_image, orientation, read, shown
from cbam.data.images import check_int
from cbam.data.loading import in_order
from cbam.data.located import LocatedJSON
from cbam.data.parquet import has_parquet, parquet_rows
from cbam.data.scan import EXTENSIONS, Classes, find_images
from cbam.data.voc import VocReader
from cbam.errors import DataError

NO_END = "a JPEG without its end marker: decoders fill in what is missing, or refuse it"
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"


def check(
    path: str | os.PathLike,
    *,
    deep: bool = False,
    workers: int = 0,
    passed: Callable[[float], None] = lambda share: None,
) -> tuple[str, Iterator[Finding]]:
    """Detect the format of the folder at `path`, and yield its faults as they are found.

    A folder with `Annotations` and `ImageSets/Main`, or with `VOC2007` or `VOC2012`, is VOC; every split is
    read. One with parquet files is read as `picture_set` reads it. One with JSON files of COCO's lists, in it
    or in a folder directly below, is COCO. Any other is taken for class folders of images.

    Args:
        deep: decode every image, look for the end marker of every JPEG, and report files that are in both
            splits or in two classes.
        workers: processes that read images ahead; they affect speed only.
        passed: called after every image with the fraction of the whole that it is.

    Raises:
        DataError: no such folder. MissingExtraError: for parquet files, when the faults are iterated.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{shown(path)}: {'a file; give its folder' if root.exists() else 'no such folder'}")
    look = _Look(deep, check_int("workers", workers, 0, 1024), passed)
    if years := voc_years(root) or ([root] if is_voc(root) else []):
        return "VOC", _voc(years, look)
    if has_parquet(root):
        return "pictures in parquet files", _parquet(root, look)
    if files := _coco_files(root):
        return "COCO", _coco(root, files, look)
    return "class folders of images", _classes(root, look)


@dataclass(frozen=True)
class _Look:
    """How images are inspected: see `check`."""

    deep: bool
    workers: int
    passed: Callable[[float], None]

    def at(
        self, items: Sequence[Any], faults: Callable[..., list[Finding]], share: float = 1.0
    ) -> Iterator[Finding]:
        """Yield the `faults` of each item, in order; the items are the fraction `share` of the whole."""
        for found in in_order(partial(faults, deep=self.deep), items, self.workers):
            self.passed(share / len(items))
            yield from found


def picture_fault(path: str | os.PathLike, *, deep: bool) -> Finding | None:
    """The fault of one image file, if any."""
    try:
        if deep:
            return _decoded_fault(read(path), shown(path))
        with Path(path).open("rb", buffering=0) as file:
            fault = not_an_image(file.read(16))
        if not fault and header_of(path) is None:
            fault = "its header cannot be read"
        return Finding(shown(path), fault) if fault else None
    except OSError as error:
        return Finding(shown(path), error.strerror or str(error))
    except DataError as error:
        return Finding("", str(error))


def _decoded_fault(data: bytes, name: str) -> Finding | None:
    try:
        decode_bytes(data, name)
    except DataError as error:
        return Finding("", str(error))
    return Finding(name, NO_END) if _lacks_end(data) else None


def _lacks_end(data: bytes) -> bool:
    """Whether a JPEG lacks its end marker, which must follow the last start of a scan: scans have neither."""
    return data.startswith(b"\xff\xd8") and data.rfind(_END_OF_IMAGE) < data.rfind(_START_OF_SCAN)


def _file_faults(path: str, *, deep: bool) -> list[Finding]:
    fault = picture_fault(path, deep=deep)
    return [fault] if fault else []


def _classes(root: Path, look: _Look) -> Iterator[Finding]:
    try:
        train, val, _ = find_images(root)
    except DataError as error:
        yield Finding("", str(error))
        files = [str(p) for p in sorted(root.rglob("*")) if p.suffix.lower() in EXTENSIONS and p.is_file()]
        yield from look.at(files, _file_faults)
        return
    yield from look.at(list(chain(*train.values(), *val.values())), _file_faults)
    if look.deep:
        yield from _twins({"train": train, "validate": val})


def _parquet(root: Path, look: _Look) -> Iterator[Finding]:
    try:
        train, val = parquet_rows(root)
    except DataError as error:
        yield Finding("", str(error))
        return
    if train.classes != val.classes:
        yield Finding(shown(root), "training and validation have different classes")
    count = len(train.targets) + len(val.targets)
    for rows in (train, val):
        if look.deep:
            own = len(rows.targets)
            yield from look.at(range(own), partial(_row_faults, rows), own / max(1, count))
        else:
            yield from (Finding(rows.name(index), fault) for index, fault in rows.faults())


def _row_faults(rows: Any, index: int, *, deep: bool) -> list[Finding]:
    fault = _decoded_fault(rows.read(index), rows.name(index))
    return [fault] if fault else []


def _twins(splits: dict[str, Classes]) -> Iterator[Finding]:
    """Find files identical to one of another split or another class."""
    placed = [
        (path, _size(path), name, what)
        for what, own in splits.items()
        for name, paths in own.items()
        for path in paths
    ]
    sizes = Counter(size for _, size, *_ in placed)
    first: dict[bytes, tuple[str, str, str]] = {}
    for path, size, name, what in placed:
        if sizes[size] == 1:
            continue
        try:
            digest = hashlib.sha256(read(path)).digest()
        except (OSError, DataError):
            continue  # reported already, or deleted since
        other, other_name, other_what = first.setdefault(digest, (path, name, what))
        if what != other_what:
            yield Finding(shown(path), f"the same file is used to {other_what}: {shown(other)}")
        elif name != other_name:
            yield Finding(shown(path), f"the same file is in class {shown(other_name)}: {shown(other)}")


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def _boxed_faults(picture: Picture, *, deep: bool) -> list[Finding]:
    """Faults of an image file, and of its annotated size."""
    faults = _file_faults(picture.path, deep=deep)
    if fault := _stated_fault(picture):
        faults.append(Finding(shown(picture.path), fault))
    return faults


def _stated_fault(picture: Picture) -> str:
    """The fault of the annotated size; "" also if the file's own size cannot be read."""
    header = header_of(picture.path)
    stored = (header.height, header.width) if header else (0, 0)
    if not header or not size_fault(picture, stored, 1):
        return ""
    try:
        data = read(picture.path)
    except DataError:  # too large, or deleted since; its own faults are reported
        return ""
    return size_fault(picture, stored, orientation(data))  # it may be that of the upright image


def _voc(roots: list[Path], look: _Look) -> Iterator[Finding]:
    """Check every split, reporting shared faults once; per-class lists (NAME_split.txt) are skipped."""
    reported: set[Finding] = set()
    pictures: dict[str, Picture] = {}
    parts: dict[str, dict[str, Finding]] = {}  # split -> class -> the finding if it is not trained
    paths: dict[str, list[str]] = {}
    for root in roots:
        lists = root / "ImageSets" / "Main"
        splits = sorted(path.stem for path in lists.glob("*.txt") if "_" not in path.stem)
        if not splits:
            yield Finding(shown(lists), "no list of images (train.txt, val.txt, ...)")
        for split in splits:
            try:
                reader = VocReader(root, split)
            except DataError as error:
                yield Finding("", str(error))
                continue
            yield from (finding for finding in reader.findings if finding not in reported)
            reported |= set(reader.findings)
            own = parts.setdefault(split, {})
            for name, node in reader.classes.items():
                own.setdefault(
                    name, node.fault(f"class {name!r} is in {split} but not in the training images")
                )
            pictures |= {picture.path: picture for picture in reader.pictures}
            paths.setdefault(split, []).extend(picture.path for picture in reader.pictures)
    train, val = next((pair for pair in PARTS if paths.keys() >= set(pair)), ("", ""))
    yield from (fault for name, fault in parts.get(val, {}).items() if name not in parts[train])
    yield from look.at(list(pictures.values()), _boxed_faults)
    if look.deep and train:
        yield from _twins({"train": {"": paths[train]}, "validate": {"": paths[val]}})


def _coco_files(root: Path) -> list[Path]:
    """The JSON files in a folder, and in the folders directly below, that look like COCO instances."""
    found = []
    for folder in (root, root / "annotations", *sorted(p for p in root.iterdir() if p.is_dir())):
        files = sorted(filter(Path.is_file, folder.glob("*.json")))
        found += [file for file in files if file not in found and _is_coco(file)]
    return found


def _is_coco(file: Path) -> bool:
    """Whether it may be a file of instances; COCO's other kinds are recognised by their names."""
    if file.name.startswith(("captions_", "person_keypoints_", "image_info_", "panoptic_", "stuff_")):
        return False
    with file.open("rb") as opened:
        head = opened.read(1 << 16).replace(b"\0", b"")  # UTF-16, reported when it is read
    return any(b'"%s"' % key.encode() in head for key in (*LISTS, "info"))


def _coco(root: Path, files: list[Path], look: _Look) -> Iterator[Finding]:
    parts: dict[str, tuple[list[str], list[str]]] = {}  # purpose -> classes and image paths
    sizes = [file.stat().st_size for file in files]  # roughly proportional to the number of images
    for file, size in zip(files, sizes, strict=True):
        try:
            document = LocatedJSON(file)
            reader = CocoReader(document, pictures_of(document, root))
        except DataError as error:
            yield Finding("", str(error))
            continue
        yield from reader.findings
        # The reader has reported the missing ones.
        there = [picture for picture in reader.pictures if is_file(Path(picture.path))]
        yield from look.at(there, _boxed_faults, size / max(1, sum(sizes)))
        purpose = _purpose(file)
        parts.setdefault(purpose, (reader.classes, [picture.path for picture in there]))
        trained = parts["train"][0] if purpose and "train" in parts else reader.classes
        if differ := differing(trained, reader.classes):
            yield Finding(shown(file), f"its categories are not those of the training file: {differ}")
    if look.deep and parts.keys() >= {"train", "validate"}:
        yield from _twins({purpose: {"": parts[purpose][1]} for purpose in ("train", "validate")})


def _purpose(file: Path) -> str:
    """What a COCO file is used for: "train", "validate", or "" for neither."""
    name = file.stem.removeprefix("instances_") if file.stem.startswith("instances_") else file.parent.name
    return "train" if name.startswith("train") else "validate" if name.startswith("val") else ""
