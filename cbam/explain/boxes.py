"""Pictures with boxes: VOC XML, COCO JSON, or a CSV of file, x0, y0, x1, y1, label.

Boxes are x0, y0, x1, y1 in pixels of the picture as it is seen, pixel (i, j) covering [j, j+1] x [i, i+1].
VOC counts pixels from 1 and includes the last: xmin..xmax is xmin - 1..xmax here.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from cbam.errors import DataError

Box = tuple[float, float, float, float]
COLUMNS = ("file", "x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Boxed:
    """A picture file and the boxes of one class in it."""

    path: Path
    label: str
    boxes: tuple[Box, ...]


def read_boxes(source: Path) -> tuple[list[Boxed], list[str]]:
    """The pictures of a set and their boxes, one `Boxed` per picture and class; and what was left out.

    Args:
        source: a folder of VOC (Annotations/*.xml beside JPEGImages/, or *.xml beside their pictures), a COCO
            .json, or a .csv with the columns file, x0, y0, x1, y1 and perhaps label. Files of a JSON or CSV
            are looked for beside it, and in images/ beside it.

    Raises:
        DataError: it cannot be read, a box is not finite, or nothing is left.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    readers = {".json": _coco, ".csv": _table}
    read = _voc if source.is_dir() else readers.get(source.suffix.lower())
    if read is None:
        raise DataError(f"{source}: expected a folder of VOC XML, a COCO .json or a .csv")
    grouped: dict[tuple[Path, str], list[Box]] = {}
    left_out: Counter[str] = Counter()
    for where, path, label, box in read(source):
        if not all(math.isfinite(value) for value in box):
            raise DataError(f"{where}: a box is not finite: {box}")
        if box[2] <= box[0] or box[3] <= box[1]:
            left_out["boxes without area"] += 1
        else:
            grouped.setdefault((path, label), []).append(box)
    missing = {path for path, _ in grouped if not path.is_file()}
    if missing:
        left_out["pictures that are not there"] = len(missing)
    found = [
        Boxed(path, label, tuple(boxes)) for (path, label), boxes in grouped.items() if path not in missing
    ]
    if not found:
        raise DataError(f"{source}: no picture with a box{_told(left_out)}")
    return sorted(found, key=lambda one: (one.path, one.label)), [
        f"{n} {what}" for what, n in left_out.items()
    ]


def _told(left_out: Counter[str]) -> str:
    return f" ({', '.join(f'{n} {what}' for what, n in left_out.items())})" if left_out else ""


Found = Iterator[tuple[str, Path, str, Box]]  # where it is written, the picture, its label, a box


def _voc(folder: Path) -> Found:
    notes = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    pictures = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else notes
    files = sorted(notes.glob("*.xml"))
    if not files:
        raise DataError(f"{folder}: no .xml in it, nor in Annotations/")
    for file in files:
        root = _parse(file)
        name = (root.findtext("filename") or "").strip() or f"{file.stem}.jpg"
        for number, thing in enumerate(root.iter("object"), 1):
            where = f"{file}, object {number}"
            try:
                x0, y0, x1, y1 = (float(thing.findtext(f"bndbox/{k}") or "") for k in _VOC)
            except ValueError as error:
                raise DataError(f"{where}: no box of four numbers") from error
            yield (
                where,
                pictures / Path(name).name,
                (thing.findtext("name") or "").strip(),
                (x0 - 1, y0 - 1, x1, y1),
            )


_VOC = ("xmin", "ymin", "xmax", "ymax")


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type, and with it every entity: an annotation has no use for one."""

    def doctype(self, name, pubid, system) -> None:
        raise DataError("it declares a document type, which annotations do not have")


def _parse(file: Path) -> ElementTree.Element:
    parser = ElementTree.XMLParser(target=_NoDoctype())
    try:
        parser.feed(file.read_bytes())
        return parser.close()
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    except (ElementTree.ParseError, OSError, LookupError, ValueError) as error:
        raise DataError(f"{file}: not an XML file that can be read ({error})") from error


def _coco(file: Path) -> Found:
    content = _json(file)
    try:
        pictures = {one["id"]: _beside(file, str(one["file_name"])) for one in content["images"]}
        names = {one["id"]: str(one["name"]) for one in content.get("categories", [])}
        notes = [
            (one.get("id"), one["image_id"], one.get("category_id"), one["bbox"])
            for one in content["annotations"]
            if not one.get("iscrowd")
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not COCO instances, {error} is missing or of another kind") from error
    for number, picture, category, box in notes:
        where = f"{file}, annotation {number}"
        if picture not in pictures:
            raise DataError(f"{where}: there is no image {picture}")
        try:
            x, y, wide, high = map(float, box)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: bbox must be four numbers, got {box!r}"[:200]) from error
        yield where, pictures[picture], names.get(category, ""), (x, y, x + wide, y + high)


def _json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno} column {error.colno}: {error.msg}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: not COCO instances, it holds a {type(content).__name__}")
    return content


def _table(file: Path) -> Found:
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    rows: Iterable[dict[str, str]] = csv.DictReader(text.splitlines())
    for number, row in enumerate(rows, 2):
        where = f"{file}, line {number}"
        if absent := [name for name in COLUMNS if not row.get(name)]:
            raise DataError(
                f"{where}: no {', '.join(absent)}; the columns are {', '.join(COLUMNS)} and label"
            )
        try:
            x0, y0, x1, y1 = (float(row[name]) for name in COLUMNS[1:])
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        yield where, _beside(file, row["file"]), row.get("label") or "", (x0, y0, x1, y1)


def _beside(file: Path, name: str) -> Path:
    path = file.parent / name
    return path if path.is_file() else file.parent / "images" / name
