"""The work of `cbam look --gates`: what the gates of every network do over a set of pictures."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cbam.app.look import LISTED, file_stem, found_in, making
from cbam.app.score import DIGITS, spaced
from cbam.app.terminal import counted
from cbam.data import cluttered_digits, decode
from cbam.errors import ConfigError, DataError
from cbam.explain.gates import FIXED, IDLE, MOSTLY, SATURATED, gate_figure, gate_statistics, gate_table
from cbam.explain.looking import Viewer
from cbam.train.watch import Watch

_BATCH = 32


def gates(viewer: Viewer, data: str, out: Path, watch: Watch, *, limit: int | None = None) -> list[Path]:
    """Sum up the gates of every network that has any, as a table and a figure in `out`; their paths.

    Args:
        data: a folder of pictures, or of one folder per class; or "digits".
        limit: take so many pictures, evenly spaced.

    Raises:
        DataError: fewer than two pictures, or some beside folders of others. ConfigError: no network has
            attention. OutputError: `out` cannot be written.
    """
    from cbam.explain.recording import record

    found = _pictures(viewer, data, out, limit)
    of = "" if found[0][1] is None else f" of {len({k for _, k in found})} classes"
    pictures = f"{counted(len(found), 'picture')}{of}"
    watch.say(pictures)
    if len(found) < 2:
        raise DataError(f"{data}: one picture cannot show what gates follow; two or more are needed")
    written: list[Path] = []
    taken: set[str] = set()
    attended = {}
    for name, net in viewer.networks.items():
        probe = viewer.normalised(_load(viewer, found[0][0]))[None]
        with torch.no_grad(), record(net.eval()) as recording:
            net(probe)
        if recording:
            attended[name] = net
    if not attended:
        raise ConfigError(f"no gates: {', '.join(viewer.networks)} without attention")
    pages = ["# What the gates do", ""]
    with making(out):
        for name, net in attended.items():
            watch.now(f"gates of {name}")
            blocks = gate_statistics(net, _batches(viewer, found, watch, len(attended)))
            stem = "gates" if len(attended) == 1 else file_stem(f"gates-{name}", taken)
            written += [gate_figure(blocks, out / (stem + ending)) for ending in (".png", ".svg")]
            pages += [f"{name}, {pictures} in {Path(data).resolve().name}:", "", gate_table(blocks), ""]
            pages += [f"![]({stem}.png)", ""]
        (out / "gates.md").write_text("\n".join([*pages, *_NOTES, ""]), encoding="utf-8")
    return [out / "gates.md", *written]


_NOTES = (
    "- Change: the norm of what the attention adds to its map, as a share of the map's norm.",
    f"- Saturated: the share of gates in the first or last {100 * SATURATED:.0f} % of their range.",
    "- Fixed, class, picture: shares of the gates' variance that are the same in every picture, that the "
    "class of the picture explains (both corrected for chance), and that single pictures add.",
    f"- In short, in this order: next to nothing, a change below {100 * IDLE:.0f} %; saturated, more than "
    f"{100 * MOSTLY:.0f} % of the channel gates; the same for every picture, more than "
    f"{100 * FIXED:.0f} % of their variance fixed; else what explains more of it, the class or the picture. "
    "Without channel gates the spatial ones are taken.",
)


def _pictures(
    viewer: Viewer, data: str, out: Path, limit: int | None
) -> list[tuple[Path | Tensor, int | None]]:
    if data == DIGITS:
        _, val = cluttered_digits()
        if viewer.size != val.size:
            raise ConfigError(f"the digits have {val.size} pixels, the networks see {viewer.size}")
        return [(val[i]["image"], val.targets[i]) for i in spaced(range(len(val)), limit)]
    folder = Path(data)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    loose = list(found_in([folder]))
    earlier = out.resolve()  # it holds figures, of an earlier look
    folders = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    inside = sorted(path for path in folders if path.resolve() != earlier)
    classes = {path.name: own for path in inside if (own := list(found_in([path])))}
    if loose and classes:
        raise DataError(
            f"{folder}: pictures beside folders of pictures ({', '.join(list(classes)[:LISTED])}); name a "
            "folder that holds the one or the other"
        )
    found: list[tuple[Path | Tensor, int | None]] = [(path, None) for path in loose]
    found += [(path, k) for k, own in enumerate(classes.values()) for path in own]
    if not found:
        raise DataError(f"{folder}: no pictures in it, nor in folders of classes in it")
    return spaced(found, limit)


def _batches(viewer: Viewer, found, watch: Watch, networks: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(found), _BATCH):
        group = found[start : start + _BATCH]
        images = viewer.normalised(torch.stack([_load(viewer, source) for source, _ in group]))
        labels = [label for _, label in group]
        yield images, None if labels[0] is None else torch.tensor(labels)
        watch.advance(len(group) / len(found) / networks)


def _load(viewer: Viewer, source: Path | Tensor) -> Tensor:
    return source if isinstance(source, Tensor) else viewer.view(decode(source))
