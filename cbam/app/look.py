"""`cbam look`: run networks on images from files and folders, and draw the figures into a folder."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cbam.data import decode
from cbam.data.decode import shown
from cbam.data.scan import EXTENSIONS
from cbam.errors import CBAMError, DataError, OutputError
from cbam.explain.looking import Look, Viewer, class_index, look
from cbam.explain.maps import METHODS, SLOW
from cbam.explain.sheet import look_figure
from cbam.explain.stages import stages_figure

ROWS = 6  # more images than this are drawn as contact sheets
SHEET = 16  # images per contact sheet, in two blocks
FIGURES = r"(look|sheet-\d+|stages-.+)\.(png|svg)"
LISTED = 6  # files named per line


@dataclass(frozen=True)
class LookRequest:
    """What to look at, and how.

    Attributes:
        paths: images, and folders of images.
        out: the output folder of the figures.
        target: a class by name or number, None for the first network's prediction.
        method, layer: as in `gradcam`.
    """

    paths: Sequence[Path]
    out: Path
    target: str | None = None
    method: str = "gradcam"
    layer: str | None = None


@dataclass
class Outcome:
    """The figures written, messages about unreadable images, and the number of images processed."""

    figures: list[Path]
    unreadable: list[str]
    processed: int = 0


def look_at(viewer: Viewer, request: LookRequest, say: Callable[[str], None]) -> Outcome:
    """Run the networks on every image and draw one row each, and its stages; or contact sheets for many.

    Unreadable images are reported and skipped.

    Raises:
        DataError: there are no images, or none can be read.
        OutputError: the figures cannot be written.
    """
    target = None if request.target is None else class_index(viewer.classes, request.target)
    files = image_files(request.paths)
    many = len(files) > ROWS or any(path.is_dir() for path in request.paths)
    outcome = Outcome([], [])
    size = SHEET if many else ROWS
    with output_folder(request.out):
        for number, start in enumerate(range(0, len(files), size), 1):
            group = files[start : start + size]
            found = _looks(viewer, group, request, target, outcome, say)
            looks = [replace(one, blocks={}) if many else one for one in found]  # sheets show no gates
            if looks:
                name = f"sheet-{number}" if many else "look"
                _draw(looks, request.out, name, 2 if many else 1, outcome)
            if not many:
                _draw_stages(looks, request.out, outcome)
        if not outcome.processed:
            raise DataError(f"no image can be read ({len(files)} tried)")
    return outcome


def _looks(viewer, files, request: LookRequest, target, outcome: Outcome, say) -> Iterator[Look]:
    for path in files:
        try:
            picture = decode(path)
        except DataError as error:
            outcome.unreadable.append(str(error))
            say(f"left out: {error}")
            continue
        if request.method in SLOW:
            say(f"{shown(path)}: {METHODS[request.method]} runs each network once per channel; this is slow")
        seen = look(
            viewer, picture, shown(path.name), target=target, method=request.method, layer=request.layer
        )
        outcome.processed += 1
        predictions = ", ".join(
            f"{g.network} predicts {g.best} ({g.best_probability:.2f})" for g in seen.glances
        )
        say(f"{shown(path)}: {predictions}")
        yield seen


def _draw(looks: list[Look], out: Path, name: str, across: int, outcome: Outcome) -> None:
    for ending in (".png", ".svg"):
        outcome.figures.append(look_figure(looks, out / (name + ending), across=across))


def _draw_stages(looks: list[Look], out: Path, outcome: Outcome) -> None:
    taken: set[str] = set()
    for one in looks:
        stem = f"stages-{Path(one.name).stem or 'picture'}"
        for network in one.blocks:
            name = file_stem(f"{stem}-{network}" if len(one.blocks) > 1 else stem, taken)
            for ending in (".png", ".svg"):
                outcome.figures.append(stages_figure(one, out / (name + ending), network=network))


def file_stem(text: str, taken: set[str]) -> str:
    """A file name from `text` that is not in `taken`, to which it is added."""
    stem = name = re.sub(r"[^\w.-]", "_", text)[:80]
    number = 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files among the paths, and the images in the folders among them, each folder sorted by name.

    Raises:
        DataError: there are none.
    """
    files = list(found_in(paths))
    if not files:
        where = ", ".join(shown(path) for path in paths)
        raise DataError(f"no images in {where}: expected {', '.join(EXTENSIONS)}{_inside(paths)}")
    return files


def _inside(paths: Sequence[Path]) -> str:
    """A hint at a subfolder that has images."""
    for path in paths:
        for folder in sorted(path.iterdir()):
            with suppress(DataError):  # an unreadable folder is no useful hint
                if folder.is_dir() and next(found_in([folder]), None):
                    return f"; there are some in {shown(folder)}: give the folders that contain them"
    return ""


def found_in(paths: Sequence[Path]) -> Iterator[Path]:
    """The files among the paths, and the images directly inside the folders among them.

    Raises:
        DataError: a folder cannot be read.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        try:
            found = sorted(path.iterdir())
        except OSError as error:
            raise DataError(f"{shown(path)}: {error.strerror or error}") from error
        visible = [p for p in found if not p.name.startswith(".")]
        yield from (p for p in visible if p.suffix.lower() in EXTENSIONS and p.is_file())


@contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """Create the output folder for the block; folders created for it are removed again if they stay empty.

    Raises:
        OutputError: the folder cannot be created, or the block cannot write to it.
    """
    made: list[Path] = []
    try:
        made += [place for place in (out, *out.parents) if not place.exists()]
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if isinstance(error, CBAMError):
            raise
        raise OutputError.at(error.filename or out, error) from error
    finally:
        with suppress(OSError):  # a folder that is not empty stays, and so do its parents
            for place in made:
                place.rmdir()


class EarlierFiles:
    """The files that were in the output folder before, so that nobody mistakes older figures for new ones."""

    def __init__(self, out: Path) -> None:
        self._out, self._names = out, []
        with suppress(OSError):  # there is no such folder yet
            self._names = sorted(path.name for path in out.iterdir())

    def describe(self, path: Path) -> str:
        """The path of a written file, and whether it replaced another."""
        return f"{path} (replaced)" if path.name in self._names else str(path)

    def leftovers(self, written: Sequence[Path], form: str) -> str:
        """A line about earlier files whose names match `form`; empty if there are none."""
        new = {path.name for path in written}
        old = [name for name in self._names if re.fullmatch(form, name) and name not in new]
        more = f" and {len(old) - LISTED} more" if len(old) > LISTED else ""
        return f"left from an earlier run in {self._out}: {', '.join(old[:LISTED])}{more}" if old else ""
