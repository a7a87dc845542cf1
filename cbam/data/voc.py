"""Read a Pascal VOC folder as images with boxes.

    FOLDER/ImageSets/Main/SPLIT.txt    names, one per line
    FOLDER/Annotations/NAME.xml
    FOLDER/JPEGImages/NAME.jpg

VOC boxes count pixels from 1, ends inclusive: xmin ymin xmax ymax becomes xmin-1 ymin-1 xmax ymax.
XML with a document type is refused, so that no entity can be defined, expanded or fetched.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.parsers import expat

from cbam.data.boxes import (
    DEGENERATE,
    BoxedImages,
    Finding,
    Picture,
    Thing,
    accept,
    clip,
    image_files,
    is_file,
)
from cbam.data.decode import header_of, read, shown
from cbam.data.scan import EXTENSIONS
from cbam.errors import DataError, InputError

MAX_XML = 1 << 24  # bytes; VOC's files have a few thousand
SIDES = ("xmin", "ymin", "xmax", "ymax")
MISSING = "an image is missing: left out"


def voc(
    folders: str | os.PathLike | Sequence[str | os.PathLike],
    split: str,
    *,
    classes: Sequence[str] | None = None,
) -> BoxedImages:
    """Read a split of a VOC folder, or of several joined: `voc([VOC2007, VOC2012], "trainval")`.

    Boxes that extend outside are clipped, empty ones and those entirely outside are dropped; `notes` counts
    them. Objects marked difficult are kept and flagged, images without objects are kept.

    Args:
        split: name of a file in ImageSets/Main, without its extension.
        classes: names in the order of the labels; for a test set, those of its training set. None: the names
            found, sorted.

    Raises:
        DataError: a file is missing or damaged, an XML file has a document type, an object has no class, a
            class that is not in `classes`, or no box of four finite numbers. The message has file and line.
        InputError: no folder, or a duplicate in `classes`.
    """
    if isinstance(folders, (str, os.PathLike)):
        folders = [folders]
    if not folders:
        raise InputError("voc takes one folder or several, got none")
    readers = [VocReader(folder, split) for folder in folders]
    findings = [finding for reader in readers for finding in reader.findings]
    found = sorted({name for reader in readers for name in reader.classes})
    labels: dict[str, int] = {}
    for label, name in enumerate(map(shown, found if classes is None else classes), 1):
        if labels.setdefault(name, label) != label:
            raise InputError(f"classes: duplicate {name!r}; every label needs its own name")
    for reader in readers:
        unknown = [name for name in reader.classes if name not in labels]
        findings += [
            reader.classes[name].fault(f"class {name!r} is not one of the classes") for name in unknown
        ]
    notes = accept(findings, shown(folders[0]))
    pictures: list[Picture] = []
    things: list[Thing] = []
    for reader in readers:
        first = len(pictures)
        pictures += [p._replace(id=first + p.id) for p in reader.pictures]
        things += [t._replace(image=first + t.image, label=labels[name]) for name, t in reader.objects]
    return BoxedImages(f"{shown(Path(folders[0]).name)} {split}", list(labels), pictures, things, notes)


class Node:
    """An XML element: its text, its children, and the line where it begins."""

    def __init__(self, tag: str, path: Path, line: int) -> None:
        self.tag, self.path, self.line = tag, path, line
        self.text, self.children = "", []

    def child(self, tag: str) -> "Node | None":
        """The first child with this tag."""
        return next((node for node in self.children if node.tag == tag), None)

    def fault(self, what: str, counted: str = "") -> Finding:
        """A finding at this line."""
        return Finding(f"{shown(self.path)} line {self.line}", what, counted)


class VocReader:
    """Reader of one split of a VOC folder; `findings` lists all its faults.

    Without a split, all XML files of Annotations, or of the folder itself, are read; a file may name its
    image, which is in JPEGImages or in the same folder, and a missing one is left out and counted.

    `objects` pairs a class name with an object whose label is not set yet; `classes` maps a class name to the
    node of its first object.
    """

    def __init__(self, folder: str | os.PathLike, split: str | None) -> None:
        self.findings: list[Finding] = []
        self.pictures: list[Picture] = []
        self.objects: list[tuple[str, Thing]] = []
        self.classes: dict[str, Node] = {}
        root = Path(folder)
        self._notes, self._folder = root / "Annotations", root / "JPEGImages"
        if split is None:
            self._notes = self._notes if self._notes.is_dir() else root
            self._folder = self._folder if self._folder.is_dir() else self._notes
        self._files = _by_stem(image_files(self._folder))
        if split is None:
            self._read_all()
            return
        for where, name in self._names(root / "ImageSets" / "Main" / f"{split}.txt"):
            self._read(where, name)

    def _read_all(self) -> None:
        files = sorted(self._notes.glob("*.xml"))
        if not files:
            raise DataError(f"{shown(self._notes)}: no .xml files")
        for file in files:
            try:
                root = parse(file)
                named = _named(root)
                picture = named if is_file(self._folder / named) else self._picture(root, file.stem)
            except DataError as error:
                self.findings.append(Finding("", str(error)))
                continue
            if picture is None:
                self.findings.append(root.fault(f"{MISSING} ({shown(named or file.stem)})", MISSING))
            else:
                self._add_image(root, file.stem, self._folder / picture)

    def _names(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yield location and name of every image of the split."""
        seen: set[str] = set()
        for number, line in enumerate(_text(path).splitlines(), 1):
            name = self._name(line.strip())
            where = f"{shown(path)} line {number}"
            if name in seen:
                self.findings.append(Finding(where, f"duplicate {shown(name)}"))
            elif name:
                seen.add(name)
                yield where, name
        if not seen:
            raise DataError(f"{shown(path)}: lists no image")

    def _name(self, line: str) -> str:
        """The image named in a line. Per-class lists have a second column, and names may contain spaces."""
        before, first = line.rsplit(maxsplit=1)[:1], line.split()[:1]
        return next((name for name in (line, *before, *first) if name in self._files), line)

    def _read(self, where: str, name: str) -> None:
        if name not in self._files:
            fault = f"there is no image {shown(name)} in {shown(self._folder)}"
            self.findings.append(Finding(where, fault))
            return
        try:
            root = parse(self._notes / f"{name}.xml")
            picture = self._picture(root, name)
        except DataError as error:
            self.findings.append(Finding("", str(error)))
            return
        assert picture is not None
        self._add_image(root, name, self._folder / picture)

    def _picture(self, root: Node, stem: str) -> str | None:
        """The image file with this stem, if any; if there are several, the one that the annotation names."""
        files = self._files.get(stem, [])
        if len(files) < 2:
            return next(iter(files), None)
        if (named := _named(root)) not in files:
            fault = f"its image may be {' or '.join(map(shown, files))}, and no filename says which"
            raise DataError(str(root.fault(fault)))
        return named

    def _add_image(self, root: Node, name: str, path: Path) -> None:
        """Add the image at `path` and the objects of its annotation."""
        try:
            height, width = _size(root, path)
        except DataError as error:
            self.findings.append(Finding("", str(error)))
            return
        index = len(self.pictures)
        self.pictures.append(Picture(index + 1, name, str(path), height, width))
        for node in root.children:
            if node.tag == "object":
                self._add_object(node, index, height, width)

    def _add_object(self, node: Node, image: int, height: int, width: int) -> None:
        name = shown(_child_text(node, "name"))
        if not name:
            self.findings.append(node.fault("an object without a name"))
            return
        self.classes.setdefault(name, node)
        box = node.child("bndbox")
        sides = [_number(box, side) for side in SIDES] if box else []
        if box is None or not all(map(math.isfinite, sides)):
            what = "has no bndbox" if box is None else "has a box that is not four finite numbers"
            self.findings.append((box or node).fault(f"{name} {what}"))
            return
        difficult = _child_text(node, "difficult") or "0"
        if difficult not in ("0", "1"):
            self.findings.append(node.fault(f"difficult is {shown(difficult)!r}, expected 0 or 1"))
            return
        self._add_box(box, name, sides, image, (height, width), difficult == "1")

    def _add_box(
        self, node: Node, name: str, sides: list[float], image: int, size: tuple[int, int], difficult: bool
    ) -> None:
        left, top, right, bottom = sides
        # In VOC's convention xmin = xmax is one pixel wide; in practice that is a click without a drag.
        flat = right <= left or bottom <= top
        x0, y0 = (0.0 if 0 <= side < 1 else side - 1 for side in (left, top))  # other tools count from 0
        box, repair = (None, DEGENERATE) if flat else clip((x0, y0, right, bottom), *size)
        if repair:
            given = " ".join(f"{side:g}" for side in sides)
            self.findings.append(node.fault(f"{repair} ({name}: {given})", repair))
        if box:
            area = (box[2] - box[0]) * (box[3] - box[1])
            self.objects.append((name, Thing(image, box, 0, area, difficult=difficult)))


def parse(path: Path) -> Node:
    """The outermost element of an XML file.

    Raises:
        DataError: it cannot be read, is damaged, or has a document type.
    """
    top = Node("", path, 0)
    stack = [top]
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(tag: str, _attributes: dict) -> None:
        node = Node(tag, path, parser.CurrentLineNumber)
        stack[-1].children.append(node)
        stack.append(node)

    def text(characters: str) -> None:
        stack[-1].text += characters

    def document_type(*_) -> None:
        line = parser.CurrentLineNumber
        raise DataError(
            f"{shown(path)} line {line}: a document type; VOC files have none, and it is not read"
        )

    parser.StartElementHandler, parser.CharacterDataHandler = start, text
    parser.EndElementHandler = lambda _: stack.pop()
    parser.StartDoctypeDeclHandler = document_type
    try:
        parser.Parse(_bytes(path), True)
    except expat.ExpatError as error:
        what = expat.ErrorString(error.code)
        raise DataError(f"{shown(path)} line {error.lineno} column {error.offset + 1}: {what}") from error
    except (LookupError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown(path)} line 1: encoding: {error}") from error
    root = top.children[0]
    if root.tag != "annotation":  # for example the error page of a failed download
        raise DataError(f"{shown(path)} line {root.line}: expected <annotation>, found <{shown(root.tag)}>")
    return root


def _size(root: Node, picture: Path) -> tuple[int, int]:
    """Height and width as the XML file states them, or of the image if it does not."""
    size = root.child("size")
    height, width = (_number(size, key) if size else 0.0 for key in ("height", "width"))
    if all(side.is_integer() and 0 < side < 1 << 20 for side in (height, width)):
        return int(height), int(width)
    if size and not (height == width == 0):
        raise DataError(
            f"{shown(size.path)} line {size.line}: height and width are not whole numbers of pixels"
        )
    header = header_of(picture)
    if header is None:
        raise DataError(
            f"{shown(picture)}: its size cannot be read, and {shown(root.path)} does not state it"
        )
    return header.height, header.width


def _named(root: Node) -> str:
    """The image file that an annotation names, without its folder; "" if none."""
    return Path(_child_text(root, "filename")).name


def _child_text(node: Node | None, tag: str) -> str:
    found = node.child(tag) if node else None
    return found.text.strip() if found else ""


def _number(node: Node | None, tag: str) -> float:
    try:
        return float(_child_text(node, tag))
    except ValueError:
        return math.nan


def _by_stem(names: set[str]) -> dict[str, list[str]]:
    """Group the image files of a folder by stem."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(EXTENSIONS):
            found.setdefault(Path(name).stem, []).append(name)
    return found


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)}: byte {error.start} is not UTF-8") from error


def _bytes(path: Path) -> bytes:
    try:
        return read(path, MAX_XML)
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror or error}") from error
