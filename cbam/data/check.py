"""Everything that is wrong with a data set on disk: image folders, COCO and VOC."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from cbam.data.boxes import Finding
from cbam.data.coco import LISTS, CocoReader, pictures_of
from cbam.data.decode import decode_bytes, header_of, not_an_image, read, shown
from cbam.data.located import LocatedJSON
from cbam.data.scan import EXTENSIONS, Classes, find_pictures
from cbam.data.voc import VocReader
from cbam.errors import DataError

NO_END = "a JPEG without its end marker: decoders fill in what is missing, or refuse it"
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"


def check(path: str | os.PathLike, *, deep: bool = False) -> tuple[str, Iterator[Finding]]:
    """What the folder at `path` is, and its faults, one by one as they are found.

    A folder with `Annotations` and `ImageSets/Main` is VOC's; every split is read. One with JSON files of
    COCO's lists, or whose folders hold some, is COCO's. Any other is taken for class folders of pictures.

    Args:
        deep: decode every picture, look for the end marker of every JPEG, and for files in both parts or in
            two classes.

    Raises:
        DataError: no such folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{shown(path)}: {'a file; give its folder' if root.exists() else 'no such folder'}")
    if (root / "Annotations").is_dir() and (root / "ImageSets" / "Main").is_dir():
        return "VOC", _voc(root, deep)
    if files := _coco_files(root):
        return "COCO", chain.from_iterable(_coco(root, file, deep) for file in files)
    return "class folders of pictures", _classes(root, deep)


def picture_fault(path: str | os.PathLike, *, deep: bool) -> Finding | None:
    """What is wrong with one picture file."""
    try:
        if deep:
            data = read(path)
            decode_bytes(data, shown(path))
            return Finding(shown(path), NO_END) if _lacks_end(data) else None
        with Path(path).open("rb", buffering=0) as file:
            fault = not_an_image(file.read(16))
        if not fault and header_of(path) is None:
            fault = "its header cannot be read"
        return Finding(shown(path), fault) if fault else None
    except OSError as error:
        return Finding(shown(path), error.strerror or str(error))
    except DataError as error:
        return Finding("", str(error))


def _lacks_end(data: bytes) -> bool:
    """Of a JPEG: neither marker can occur inside a scan, so the last end must follow the last scan."""
    return data.startswith(b"\xff\xd8") and data.rfind(_END_OF_IMAGE) < data.rfind(_START_OF_SCAN)


def _pictures(paths: Iterator[str], deep: bool) -> Iterator[Finding]:
    for path in paths:
        fault = picture_fault(path, deep=deep)
        if fault:
            yield fault


def _classes(root: Path, deep: bool) -> Iterator[Finding]:
    try:
        train, val, _ = find_pictures(root)
    except DataError as error:
        yield Finding("", str(error))
        files = (str(p) for p in sorted(root.rglob("*")) if p.suffix.lower() in EXTENSIONS and p.is_file())
        yield from _pictures(files, deep)
        return
    yield from _pictures(chain(*train.values(), *val.values()), deep)
    if deep:
        yield from _twins({"train": train, "validate": val})


def _twins(splits: dict[str, Classes]) -> Iterator[Finding]:
    """Files with the bytes of one that has another purpose or another class."""
    placed = [
        (path, Path(path).stat().st_size, name, what)
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
            continue  # it was told of before
        other, other_name, other_what = first.setdefault(digest, (path, name, what))
        if what != other_what:
            yield Finding(shown(path), f"the same file is there to {other_what}: {shown(other)}")
        elif name != other_name:
            yield Finding(shown(path), f"the same file is in class {shown(other_name)}: {shown(other)}")


def _voc(root: Path, deep: bool) -> Iterator[Finding]:
    """Every split once; what two splits share is told once. Lists of single classes repeat the whole ones."""
    splits = sorted(path.stem for path in (root / "ImageSets" / "Main").glob("*.txt") if "_" not in path.stem)
    if not splits:
        yield Finding(shown(root / "ImageSets" / "Main"), "no list of pictures (train.txt, val.txt, ...)")
    told: set[Finding] = set()
    paths: dict[str, None] = {}
    for split in splits:
        try:
            reader = VocReader(root, split)
        except DataError as error:
            yield Finding("", str(error))
            continue
        yield from (finding for finding in reader.findings if finding not in told)
        told |= set(reader.findings)
        paths |= {picture.path: None for picture in reader.pictures}
    yield from _pictures(iter(paths), deep)


def _coco_files(root: Path) -> list[Path]:
    """The JSON files in a folder, and in the folders right below, that look like COCO's instances."""
    found = []
    for folder in (root, root / "annotations", *sorted(p for p in root.iterdir() if p.is_dir())):
        files = sorted(folder.glob("*.json")) if folder.is_dir() else []
        found += [file for file in files if file not in found and _is_coco(file)]
    return found


def _is_coco(file: Path) -> bool:
    """COCO's other files have images and annotations too, of another kind; their names tell them."""
    if file.name.startswith(("captions_", "person_keypoints_", "image_info_", "panoptic_", "stuff_")):
        return False
    with file.open("rb") as opened:
        head = opened.read(1 << 16)
    return any(b'"%s"' % key.encode() in head for key in (*LISTS, "info"))


def _coco(root: Path, file: Path, deep: bool) -> Iterator[Finding]:
    try:
        document = LocatedJSON(file)
        reader = CocoReader(document, pictures_of(document, root))
    except DataError as error:
        yield Finding("", str(error))
        return
    yield from reader.findings
    there = (p.path for p in reader.pictures if Path(p.path).is_file())  # the reader told of the others
    yield from _pictures(there, deep)
