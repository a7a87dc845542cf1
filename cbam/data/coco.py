"""Read a COCO instances file and its image folder as images with boxes.

`bbox` is x y w h from the upper left corner of the image. Classes are in the order of their ids.
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cbam.data.boxes import BoxedImages, Finding, Picture, Thing, accept, clip, image_files, is_file
from cbam.data.decode import header_of, shown
from cbam.data.located import Element, LocatedJSON
from cbam.data.segmentation import mask_fault
from cbam.errors import DataError

LISTS = ("images", "annotations", "categories")
FILLED_AREA = "an annotation has no area: width times height is used"
FILLED_CROWD = "an annotation has no iscrowd: 0 is used"
TWICE = "an image is listed again under another id, with boxes of its own: both are kept"
ID_ZERO = "an annotation has the id 0, which COCO's evaluation takes for no match: renumbered"


def coco(annotations: str | os.PathLike, pictures: str | os.PathLike) -> BoxedImages:
    """Read the data set of a COCO file, such as instances_val2017.json, and the folder of its images.

    Boxes that extend outside are clipped, empty ones and those entirely outside are dropped, and a missing
    `area` or `iscrowd` is filled in; `notes` counts all that. Crowds are kept and flagged, images without
    boxes are kept.

    Raises:
        DataError: the file is missing, truncated or not JSON; an id is a duplicate or unknown; a box is not
            four finite numbers; a mask is damaged; an image is missing. The message has line, column and id.
    """
    reader = CocoReader(LocatedJSON(annotations), pictures)
    notes = accept(reader.findings, str(Path(annotations).parent))
    name = shown(Path(annotations).stem)
    return BoxedImages(name, reader.classes, reader.pictures, reader.things, notes, rules="coco")


class CocoReader:
    """Reader of a COCO file; `findings` lists all its faults.

    Args:
        missing: count missing images as this kind of fault and leave them out, and take a missing size from
            the image file; if empty, reject both.

    Raises:
        DataError: the file lacks one of its lists.
    """

    def __init__(self, file: LocatedJSON, pictures: str | os.PathLike, *, missing: str = "") -> None:
        self.file, self._missing = file, missing
        self._left_out: set[int] = set()  # ids of missing images
        for key in LISTS:
            if key not in file:
                raise DataError(f"{shown(file.path)}: no {key!r}; a COCO file has {', '.join(LISTS)}")
            if file.elements(key) is None:
                raise DataError(f"{shown(file.path)}: {key!r} is not a list")
        self.findings: list[Finding] = []
        self.pictures: list[Picture] = []
        self.things: list[Thing] = []
        self.classes: list[str] = []
        self._labels: dict[int, int] = {}  # category id -> label
        self._indices: dict[int, int] = {}  # image id -> index
        self._folder = Path(pictures)
        self._read_categories()
        self._read_images()
        self._read_annotations()

    def _read_categories(self) -> None:
        found = {}
        for id, element in self._identified("categories", "category"):
            name = element.value.get("name")
            if isinstance(name, str) and name:
                found[id] = shown(name)
            else:
                self._refuse(element, f"category {id} has the name {name!r}, expected text")
        self.classes = [found[id] for id in sorted(found)]
        self._labels = {id: label for label, id in enumerate(sorted(found), 1)}

    def _read_images(self) -> None:
        files = image_files(self._folder)
        names: set[str] = set()
        for id, element in self._identified("images", "image"):
            name = element.value.get("file_name")
            if not isinstance(name, str) or not name or "\0" in name:
                self._refuse(element, f"image {id} has the file_name {name!r}, expected text")
                continue
            path = self._folder / name
            # The listing covers only names directly in the folder.
            there = is_file(path) if "/" in name or "\\" in name else name in files
            if not there and self._missing:
                self._count(element, self._missing, f" ({shown(path)})")
                self._left_out.add(id)
                continue
            height, width = (
                _stated_or_actual_size(element.value, path) if self._missing else _stated_size(element.value)
            )
            if not (_is_int(height) and _is_int(width) and 0 < height < 1 << 20 and 0 < width < 1 << 20):
                self._refuse(
                    element, f"image {id} has height {height!r} and width {width!r}, expected pixels"
                )
                continue
            if not there:
                self._refuse(element, f"image {id}: {shown(path)} is missing")
            if name in names:
                self._count(element, TWICE, f" ({shown(path)})")
            names.add(name)
            self._indices[id] = len(self.pictures)
            self.pictures.append(Picture(id, name, str(path), height, width))

    def _read_annotations(self) -> None:
        unfilled: dict[str, list[Element]] = {FILLED_AREA: [], FILLED_CROWD: []}
        unknown: dict[tuple[str, Any], list[tuple[int, Element]]] = {}
        for id, element in self._identified("annotations", "annotation"):
            if id == 0:
                self._count(element, ID_ZERO)
            image = element.value.get("image_id")
            if isinstance(image, int) and image in self._left_out:
                continue
            place = self._resolve(id, element, unknown)
            fault = _annotation_fault(element.value)
            if fault:
                self._refuse(element, f"annotation {id}: {fault}")
            elif place:
                self._add(id, element, *place)
                for kind, key in ((FILLED_AREA, "area"), (FILLED_CROWD, "iscrowd")):
                    if element.value.get(key) is None:
                        unfilled[kind].append(element)
        self._report_unknown(unknown)
        for kind, elements in unfilled.items():
            if elements:
                self._count(elements[0], kind, times=len(elements))

    def _resolve(self, id: int, element: Element, unknown: dict) -> tuple[int, int] | None:
        """Image index and label of an annotation; unknown ids are collected in `unknown`."""
        place = []
        for key, known in (("image_id", self._indices), ("category_id", self._labels)):
            value = element.value.get(key)
            if _is_int(value) and value in known:
                place.append(known[value])
            else:
                unknown.setdefault((key, str(value)), []).append((id, element))
        return (place[0], place[1]) if len(place) == 2 else None

    def _report_unknown(self, unknown: dict[tuple[str, str], list[tuple[int, Element]]]) -> None:
        for (key, value), users in unknown.items():
            ids = ", ".join(str(id) for id, _ in users[:5]) + (", ..." if len(users) > 5 else "")
            what = f"{key} {value} of annotation {ids} is not among the file's"
            self._refuse(users[0][1], f"{what} {'images' if key == 'image_id' else 'categories'}")

    def _add(self, id: int, element: Element, image: int, label: int) -> None:
        """Add an annotation after checking its mask and its box against its image."""
        picture = self.pictures[image]
        mask = element.value.get("segmentation")
        fault = "" if mask is None else mask_fault(mask, picture.height, picture.width)
        if fault:
            self._refuse(element, f"annotation {id}: {fault}")
            return
        x, y, w, h = element.value["bbox"]
        box, repair = clip((x, y, x + w, y + h), picture.height, picture.width)
        if repair:
            self._count(element, repair, f" (annotation {id}: {x:g} {y:g} {w:g} {h:g})")
        if box:
            area = element.value.get("area")
            crowd = bool(element.value.get("iscrowd"))
            self.things.append(Thing(image, box, label, float(w * h if area is None else area), crowd))

    def _identified(self, key: str, noun: str) -> Iterable[tuple[int, Element]]:
        """Yield the elements of a list with a valid, unique id."""
        seen: set[int] = set()
        for element in self.file.elements(key) or []:
            id = element.value.get("id") if isinstance(element.value, dict) else None
            if element.constant is not None:
                where = self.file.where(element.constant)
                self.findings.append(Finding(where, f"NaN and Infinity are not JSON ({noun} {id!r})"))
            elif id is None or not _is_int(id):
                self._refuse(element, f"an element of {key!r} has the id {id!r}, expected an integer")
            elif id in seen:
                self._refuse(element, f"duplicate {noun} id {id}")
            else:
                seen.add(id)
                yield id, element

    def _refuse(self, element: Element, what: str) -> None:
        self.findings.append(Finding(self.file.where(element.start), what))

    def _count(self, element: Element, kind: str, detail: str = "", times: int = 1) -> None:
        detail = f" ({times} annotations)" if times > 1 else detail
        self.findings.append(Finding(self.file.where(element.start), kind + detail, kind, times))


def _stated_size(image: dict) -> tuple[Any, Any]:
    """Height and width of an image as the COCO file states them."""
    return image.get("height"), image.get("width")


def _stated_or_actual_size(image: dict, path: Path) -> tuple[Any, Any]:
    """As `_stated_size`, or read from the image if neither is stated."""
    header = header_of(path) if _stated_size(image) == (None, None) else None
    return (header.height, header.width) if header else _stated_size(image)


def pictures_of(document: LocatedJSON, root: Path) -> Path:
    """The image folder of a COCO file: the first candidate that holds one of its first 100 images.

    Candidates for annotations/instances_val2017.json are val2017, images/val2017, images and the folder
    itself; if none holds an image, the first that exists.
    """
    split = document.path.stem.removeprefix("instances_")
    names = (split, f"images/{split}", "images", ".")
    candidates = [base / name for base in (root, document.path.parent) for name in names]
    there = [folder for folder in candidates if folder.is_dir()]
    listed = document.elements("images") if "images" in document else None
    values = [element.value for element in (listed or [])[:100]]
    found = [value.get("file_name") for value in values if isinstance(value, dict)]
    known = [name for name in found if isinstance(name, str)]
    having = (folder for folder in there if any(is_file(folder / name) for name in known))
    return next(having, there[0])


def _annotation_fault(annotation: dict) -> str:
    """The fault of its numbers, or "". Other tools write null for unknown values, and true and false."""
    box, area, crowd = (annotation.get(key) for key in ("bbox", "area", "iscrowd"))
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        return f"bbox is {_short(box)}, expected four finite numbers"
    if area is not None and (not _is_finite(area) or area < 0):
        return f"area is {_short(area)}, expected a finite number >= 0"
    known = crowd is None or (type(crowd) in (int, bool) and crowd in (0, 1))
    return "" if known else f"iscrowd is {_short(crowd)}, expected 0 or 1"


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 63


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
