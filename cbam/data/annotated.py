"""A set of images with boxes in any supported format: VOC XML, COCO JSON, or a CSV table.

`voc` and `coco` read training data and reject an incomplete set. `annotated` is lenient: a missing image is
left out and counted.
"""

import csv
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path

from cbam.data.boxes import BoxedImages, Finding, Picture, Thing, accept, clip, is_file
from cbam.data.coco import CocoReader, pictures_of
from cbam.data.decode import read_text, shown
from cbam.data.located import LocatedJSON
from cbam.data.voc import MISSING, VocReader
from cbam.errors import DataError

COLUMNS = ("file", "x0", "y0", "x1", "y1")


def annotated(source: str | os.PathLike) -> BoxedImages:
    """Read a set of images with boxes; `notes` counts what was left out or repaired.

    Args:
        source: a VOC folder (`Annotations/*.xml` next to `JPEGImages/`, or `*.xml` next to their images), a
            COCO .json, or a .csv with the columns file, x0, y0, x1, y1 and optionally label. The images of a
            JSON or CSV are expected in the same folder, or in images/ there. The boxes of a CSV are in pixels
            of the upright image; pixel (i, j) covers [j, j+1] x [i, i+1].

    Raises:
        DataError: it cannot be read, a box is not finite, or nothing is left.
    """
    path = Path(source)
    if not path.exists():
        raise DataError(f"{shown(source)}: no such file or folder")
    read = _voc if path.is_dir() else {".json": _coco, ".csv": _Table}.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{shown(source)}: expected a folder of VOC XML, a COCO .json or a .csv")
    reader = read(path)
    notes = accept(reader.findings, shown(source))
    if not reader.things:
        raise DataError(f"{shown(source)}: no image with a box" + "".join(f"; {note}" for note in notes))
    return BoxedImages(shown(path.name), reader.classes, reader.pictures, reader.things, notes)


def _voc(folder: Path) -> "_Labelled":
    return _Labelled(VocReader(folder, None))


def _coco(file: Path) -> CocoReader:
    document = LocatedJSON(file)
    return CocoReader(document, pictures_of(document, file.parent), missing=MISSING)


class _Labelled:
    """A VOC reader with labels assigned to the classes in alphabetical order."""

    def __init__(self, reader: VocReader) -> None:
        self.findings, self.pictures = reader.findings, reader.pictures
        self.classes = sorted(reader.classes)
        labels = {name: label for label, name in enumerate(self.classes, 1)}
        self.things = [thing._replace(label=labels[name]) for name, thing in reader.objects]


class _Table:
    """A CSV file with one box per line."""

    def __init__(self, file: Path) -> None:
        self.findings: list[Finding] = []
        self.pictures: list[Picture] = []
        try:
            rows = list(self._rows(file))
        except csv.Error as error:  # for example a field of more than 128 KB
            raise DataError(f"{shown(file)}: {error}") from error
        self.classes = sorted({label for *_, label in rows})
        indices: dict[Path, int] = {}
        self.things: list[Thing] = []
        for where, path, box, label in rows:
            if not is_file(path):
                self.findings.append(Finding(where, f"{MISSING} ({shown(path)})", MISSING))
                continue
            inside, repair = clip(box, 1 << 30, 1 << 30)  # the image's size is known only once it is read
            if repair:
                self.findings.append(Finding(where, repair, repair))
            if inside is None:
                continue
            index = indices.setdefault(path, len(indices))
            if index == len(self.pictures):
                self.pictures.append(Picture(index + 1, path.name, str(path), 0, 0))
            area = (inside[2] - inside[0]) * (inside[3] - inside[1])
            self.things.append(Thing(index, inside, self.classes.index(label) + 1, area))

    def _rows(self, file: Path) -> Iterator[tuple[str, Path, tuple[float, float, float, float], str]]:
        table = csv.DictReader(io.StringIO(read_text(file), newline=""), skipinitialspace=True)
        for row in table:
            where = f"{shown(file)} line {table.line_num}"
            if absent := [name for name in COLUMNS if not row.get(name)]:
                fault = f"no {', '.join(absent)}; the columns are {', '.join(COLUMNS)} and label"
                self.findings.append(Finding(where, fault))
                continue
            try:
                x0, y0, x1, y1 = (float(row[name]) for name in COLUMNS[1:])
            except ValueError as error:
                self.findings.append(Finding(where, str(error)))
                continue
            if not all(map(math.isfinite, (x0, y0, x1, y1))):
                self.findings.append(Finding(where, f"a box is not finite: {x0:g} {y0:g} {x1:g} {y1:g}"))
                continue
            yield where, _image_path(file, row["file"]), (x0, y0, x1, y1), shown(row.get("label") or "")


def _image_path(file: Path, name: str) -> Path:
    path = file.parent / name
    return path if is_file(path) else file.parent / "images" / name
