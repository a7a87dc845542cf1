"""`cbam look --gates`: statistics of the gates of every network over a set of images."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cbam.app.look import LISTED, file_stem, found_in, output_folder
from cbam.app.score import DIGITS, digits_for, evenly_spaced
from cbam.app.terminal import counted
from cbam.data import decode
from cbam.errors import ConfigError, DataError
from cbam.explain.gates import (
    FIXED,
    IDLE,
    MOSTLY_SATURATED,
    SATURATED,
    gate_figure,
    gate_statistics,
    gate_table,
)
from cbam.explain.looking import Viewer
from cbam.explain.recording import record
from cbam.train.watch import Watch

_BATCH = 32


def gates(viewer: Viewer, data: str, out: Path, watch: Watch, *, limit: int | None = None) -> list[Path]:
    """Summarise the gates of every network that has any, as a table and a figure in `out`; returns the paths.

    Unreadable images are reported, left out and counted.

    Args:
        data: a folder of images, or with one folder per class; or "digits".
        limit: use this many images, evenly spaced.

    Raises:
        DataError: fewer than two readable images, or images next to folders of images. ConfigError: no
            network has attention. OutputError: `out` cannot be written.
    """
    pictures = _Pictures(viewer, data, out, limit, watch)
    attended = _attended(viewer, pictures)
    pages = ["# What the gates do", ""]
    written: list[Path] = []
    taken: set[str] = set()
    with output_folder(out):
        for name, net in attended.items():
            watch.now(f"gates of {name}")
            blocks = gate_statistics(net, pictures.batches(1 / len(attended)))
            stem = "gates" if len(attended) == 1 else file_stem(f"gates-{name}", taken)
            written += [gate_figure(blocks, out / (stem + ending)) for ending in (".png", ".svg")]
            pages += [f"{name}, {pictures.describe()} in {Path(data).resolve().name}:", ""]
            pages += [gate_table(blocks), "", f"![]({stem}.png)", ""]
        notes = [f"- Left out: {note}." for note in pictures.left_out()]
        (out / "gates.md").write_text("\n".join([*pages, *notes, *_NOTES, ""]), encoding="utf-8")
    return [out / "gates.md", *written]


def _attended(viewer: Viewer, pictures: "_Pictures") -> dict[str, nn.Module]:
    """The networks that have attention."""
    probe = viewer.normalised(pictures.first())[None]
    attended: dict[str, nn.Module] = {}
    for name, net in viewer.networks.items():
        with torch.no_grad(), record(net.eval()) as recording:
            net(probe)
        if recording:
            attended[name] = net
    if not attended:
        raise ConfigError(f"no gates: {', '.join(viewer.networks)} without attention")
    return attended


_NOTES = (
    "- Change: the norm of what the attention adds to its map, as a share of the map's norm.",
    f"- Saturated: the share of gates in the first or last {100 * SATURATED:.0f} % of their range.",
    "- Fixed, class, image: shares of the gates' variance that are the same in every image, that the "
    "class of the image explains (both corrected for chance), and that single images add.",
    f"- In short, in this order: next to nothing, a change below {100 * IDLE:.0f} %; saturated, more than "
    f"{100 * MOSTLY_SATURATED:.0f} % of the channel gates; the same channels for every image, more than "
    f"{100 * FIXED:.0f} % of their variance fixed; else what explains more of it, the class or the image. "
    "Without channel gates the spatial gates decide.",
)


class _Pictures:
    """The preprocessed images of a folder; unreadable ones are reported once."""

    def __init__(self, viewer: Viewer, data: str, out: Path, limit: int | None, watch: Watch) -> None:
        self._viewer, self._data, self._watch = viewer, data, watch
        self._found = _found(viewer, data, out, limit)
        self._unreadable: set[int] = set()
        watch.say(self.describe())
        if len(self._found) < 2:
            raise DataError(f"{data}: one image cannot show what gates follow; at least two are needed")

    def describe(self) -> str:
        """The number of images, and of classes."""
        labels = [label for i, (_, label) in enumerate(self._found) if i not in self._unreadable]
        of = "" if labels[0] is None else f" of {len(set(labels))} classes"
        return f"{counted(len(labels), 'image')}{of}"

    def left_out(self) -> list[str]:
        """Lines about unreadable images."""
        count = len(self._unreadable)
        return [f"{counted(count, 'image')} that cannot be read"] if count else []

    def first(self) -> Tensor:
        """The first readable image."""
        images = (self._load(i) for i in range(len(self._found)))
        if (image := next((image for image in images if image is not None), None)) is None:
            raise DataError(f"{self._data}: no image can be read ({len(self._found)} tried)")
        return image

    def batches(self, share: float) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of images and classes, which are `share` of the whole work."""
        total, read = len(self._found), 0
        for start in range(0, total, _BATCH):
            numbers = range(start, min(start + _BATCH, total))
            group = [(image, i) for i in numbers if (image := self._load(i)) is not None]
            labels = [self._found[i][1] for _, i in group]
            if group:
                images = self._viewer.normalised(torch.stack([image for image, _ in group]))
                yield images, None if labels[0] is None else torch.tensor(labels)
            read += len(group)
            self._watch.advance(len(numbers) / total * share)
        if read < 2:
            raise DataError(f"{self._data}: {read} of {total} images can be read; at least two are needed")

    def _load(self, index: int) -> Tensor | None:
        if index in self._unreadable:
            return None
        source, _ = self._found[index]
        try:
            return source if isinstance(source, Tensor) else self._viewer.view(decode(source))
        except DataError as error:
            self._unreadable.add(index)
            self._watch.say(f"left out: {error}")
            return None


def _found(viewer: Viewer, data: str, out: Path, limit: int | None) -> list[tuple[Path | Tensor, int | None]]:
    """Images, or their paths, with a class each, or all without classes."""
    if data == DIGITS:
        val = digits_for(viewer)
        return [(val[i]["image"], val.targets[i]) for i in evenly_spaced(range(len(val)), limit)]
    folder = Path(data)
    if folder.is_file():
        raise DataError(f"{folder} is a file: --gates takes a folder of images")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    loose = list(found_in([folder]))
    own_output = out.resolve()  # it may hold figures of an earlier call
    folders = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    inside = sorted(path for path in folders if path.resolve() != own_output)
    classes = {path.name: own for path in inside if (own := list(found_in([path])))}
    if loose and classes:
        raise DataError(
            f"{folder}: images next to folders of images ({', '.join(list(classes)[:LISTED])}); give a "
            "folder that has only one of the two"
        )
    found: list[tuple[Path | Tensor, int | None]] = [(path, None) for path in loose]
    found += [(path, k) for k, own in enumerate(classes.values()) for path in own]
    if not found:
        raise DataError(f"{folder}: no images in the folder or in class folders inside it")
    return evenly_spaced(found, limit)
