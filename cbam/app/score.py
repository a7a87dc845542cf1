"""`cbam look --score`: how well the maps of networks localise objects with known boxes.

Every measure is a value per image, so networks are compared image by image. Two baselines are included that
a useful map must beat: a Gaussian at the centre of the image, and the map of the untrained network.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbam.app.look import output_folder
from cbam.app.terminal import counted
from cbam.data import annotated, cluttered_digits
from cbam.errors import ConfigError, DataError
from cbam.explain import gradcam
from cbam.explain.localisation import (
    STEPS,
    THRESHOLDS,
    box_area,
    centre_prior,
    deletion_insertion,
    energy,
    overlap,
    pointing,
    untrained,
)
from cbam.explain.looking import Viewer
from cbam.explain.maps import METHODS
from cbam.explain.watching import logits_of
from cbam.studies.statistics import paired_difference
from cbam.surgery.effects import eval_mode
from cbam.train.versions import versions
from cbam.train.watch import Watch

DIGITS = "digits"  # in place of a file: the validation digits, which have boxes
VISIBLE = 0.5  # an image counts if at least this share of its boxes is in view
CENTRE, UNTRAINED = "centre prior", "untrained"
MEASURES = {  # key -> title, factor, whether lower is better
    "pointing": ("pointing game, %", 100, False),
    "energy": ("energy in the box, %", 100, False),
    "iou": ("IoU at the best threshold, %", 100, False),
    "deletion": ("deletion area", 1, True),
    "insertion": ("insertion area", 1, False),
}
_Measured = dict[str, dict[str, list[float]]]  # map -> measure -> a value per image


@dataclass(frozen=True, eq=False)
class Sample:
    """A preprocessed image, uint8 (3, H, W), and the area of its object, (H, W) in [0, 1].

    An image with objects of several labels gives one sample per label, all with the same `picture`.
    """

    picture: int  # index of the image
    name: str
    image: Tensor
    area: Tensor
    label: str


def score(
    viewer: Viewer,
    data: str,
    watch: Watch,
    *,
    method: str = "gradcam",
    layer: str | None = None,
    limit: int | None = None,
    label: str | None = None,
) -> dict[str, Any]:
    """Score the maps of every network of `viewer` on the images of `data`; returns the content of score.json.

    A map is for the class of the label if the networks have it, otherwise for the first network's prediction.
    An image with objects of several labels has a map for each; its value is their mean.

    Args:
        data: a file or folder for `cbam.data.annotated`, or "digits".
        method, layer: as in `gradcam`; used for the untrained network too.
        limit: use this many images, evenly spaced.
        label: use only the boxes with this label.

    Raises:
        DataError: no images, or none with its object in view.
        ConfigError: the label is the name of several classes.
    """
    found, notes = samples(viewer, data, limit, label)
    names = {sample.picture: sample.name for sample in found}
    watch.say("; left out: ".join([f"{counted(len(names), 'image')} with boxes", *notes]))
    named, first = next(iter(viewer.networks.items()))
    untrained_net = untrained(first, viewer.normalised(torch.stack([one.image for one in found[:16]])))
    values, labelled = _Values(), 0
    for sample in found:
        image = viewer.normalised(sample.image)
        target, known = _target(viewer, first, image, sample.label)
        labelled += known
        for name, heat in _maps(viewer, untrained_net, image, target, method, layer).items():
            values.add(name, heat, sample.area, viewer.networks.get(name, first), image, target)
        watch.advance(1 / len(found))
    of = f" of {layer}" if layer else ""
    folder = Path(data).name or Path(data).resolve().name  # "." has no name
    thresholds, measured = values.at_best_thresholds([sample.picture for sample in found])
    return {
        "what": f"{METHODS[method]}{of} on {folder}" + (f", boxes of {label}" if label else ""),
        "layer": layer,
        "networks": list(viewer.about),
        "pictures": len(names),
        "maps": len(found),
        "left_out": [note.replace(f"{Path(data).parent}/", "") for note in notes],  # no local paths
        "class": {"of the label": labelled, f"what {named} says": len(found) - labelled},
        "object_share": statistics.fmean(float(one.area.mean()) for one in found),
        "steps": STEPS,
        "thresholds": thresholds,
        "scores": _each(measured, statistics.fmean),
        "differences": _differences(viewer, measured),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "values": _each(measured, lambda own: [round(value, 5) for value in own]),
        "names": list(names.values()),
    }


def _maps(
    viewer: Viewer, untrained_net: nn.Module, image: Tensor, target: int, method: str, layer: str | None
) -> dict[str, Tensor]:
    """The maps of every network and of the two baselines, (H, W) each."""
    networks = {**viewer.networks, UNTRAINED: untrained_net}
    maps = {name: gradcam(net, image[None], target, layer, method)[0] for name, net in networks.items()}
    return {**maps, CENTRE: centre_prior(*image.shape[1:])}


def samples(
    viewer: Viewer, data: str, limit: int | None, label: str | None
) -> tuple[list[Sample], list[str]]:
    """The images whose object is in view, and lines about what was left out."""
    if data == DIGITS:
        return _digits(viewer, limit), []
    images = annotated(data)
    classes, notes = images.classes, list(images.notes)
    if label is not None and label not in classes:
        raise ConfigError(f"no box with label {label!r}; the labels are {', '.join(classes[:10])}")
    wanted = [
        (picture.path, index, own)
        for index, picture in enumerate(images.pictures)
        if (own := [k for k in images.labels(index) if label in (None, classes[k - 1])])
    ]
    found, hidden, unreadable = [], 0, []
    for path, index, labels in evenly_spaced(sorted(wanted), limit):
        try:
            item = images[index]
        except DataError as error:
            unreadable.append(str(error))
            continue
        view = viewer.view(item["image"])
        for k in labels:
            if (area := _area_in_view(viewer, item, k)) is None:
                hidden += 1
                continue
            found.append(Sample(index, Path(path).name, view, area, classes[k - 1]))
    if hidden:
        notes.append(f"{counted(hidden, 'object')} of which less than half is in view")
    if unreadable:
        of_them = ", the first" if len(unreadable) > 1 else ""
        notes.append(f"{counted(len(unreadable), 'image')} that cannot be read{of_them}: {unreadable[0]}")
    if not found:
        raise DataError("; left out: ".join([f"{data}: no image with its object in view", *notes]))
    return found, notes


def _area_in_view(viewer: Viewer, item: dict[str, Any], label: int) -> Tensor | None:
    """The area of a label's objects in the preprocessed image; None if less than VISIBLE of it is in view."""
    own = item["boxes"][(item["labels"] == label) & ~item["crowd"]]
    boxes = viewer.boxes_in_view(own.tolist(), *item["image"].shape[1:])
    whole = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
    seen = sum(float(box_area([box], viewer.size, viewer.size).sum()) for box in boxes)
    return None if seen < VISIBLE * whole else box_area(boxes, viewer.size, viewer.size)


def _digits(viewer: Viewer, limit: int | None) -> list[Sample]:
    val = digits_for(viewer)
    found = []
    for i in evenly_spaced(range(len(val)), limit):
        item = val[i]
        area = box_area([item["box"].tolist()], val.size, val.size)
        found.append(Sample(i, f"digit {i}", item["image"], area, val.classes[item["target"]]))
    return found


def digits_for(viewer: Viewer):
    """The validation digits.

    Raises:
        ConfigError: the networks take images of another size.
    """
    _, val = cluttered_digits()
    if viewer.size != val.size:
        raise ConfigError(
            f"the digits have {val.size} pixels, but the networks take {viewer.size}; give --size {val.size}"
        )
    return val


def write(results: dict[str, Any], out: Path) -> list[Path]:
    """Write the results as score.json and as a readable page, score.md."""
    page, record = out / "score.md", out / "score.json"
    with output_folder(out):
        record.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        page.write_text(markdown(results), encoding="utf-8")
    return [page, record]


def markdown(results: dict[str, Any]) -> str:
    """The results of `score` as a Markdown page."""
    names = list(results["scores"])
    lines = [f"# Do the maps find the object? {results['what']}", ""]
    lines += [f"- {line}" for line in results["networks"]]
    share, pictures = 100 * results["object_share"], counted(results["pictures"], "image")
    lines += [f"- {pictures}; the object covers {share:.1f} % of them on average"]
    lines += [f"- left out: {note}" for note in results["left_out"]]
    maps = results.get("maps", results["pictures"])  # older records had one map per image
    noun = "image" if maps == results["pictures"] else "map"
    if noun == "map":
        lines += [f"- one map per label in an image, {maps} in all; the value of an image is their mean"]
    of_class = [(which, counted(n, noun)) for which, n in results["class"].items() if n]
    lines += [f"- the map is for the class {which}: {many}" for which, many in of_class]
    lines += ["", f"|  | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for key, (words, factor, _) in MEASURES.items():
        cells = [f"{factor * results['scores'][name][key]:.{1 if factor == 100 else 3}f}" for name in names]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    for pair, found in results["differences"].items():
        lines += ["", f"**{pair}**, paired image by image:", ""]
        lines += [f"- {_describe(key, found[key])}" for key in MEASURES]
    lines += ["", *_NOTES, ""]
    return "\n".join(lines)


_NOTES = (
    "- Pointing game: whether the map's maximum is on the object. Energy: the share of the map's sum on it.",
    "- IoU: of the object and the part of the map above a threshold, a share of the map's maximum. Each map "
    "has one threshold for all images: the best one on these images.",
    "- Deletion (lower is better) and insertion (higher is better): the area under the probability of the "
    f"class while pixels are removed, or added, in descending order of the map, in {STEPS} steps. Each "
    "network judges its own map; the first one also judges the centre prior and the untrained network.",
    "- Centre prior: a Gaussian in the middle, the same for every image. Untrained: the first network with "
    "random weights.",
    "- Intervals: Student's t, 95 %, over the differences per image; better and worse mean that it "
    "excludes zero. They say nothing about other trainings of the same networks.",
)


def _describe(key: str, found: dict[str, Any]) -> str:
    words, factor, _ = MEASURES[key]
    digits = 2 if factor == 100 else 4
    interval = ""
    if found["low"] is not None:
        interval = f" ({factor * found['low']:+.{digits}f} to {factor * found['high']:+.{digits}f})"
    return f"{words}: {factor * found['mean']:+.{digits}f}{interval}, {found['word']}"


def _differences(viewer: Viewer, values: _Measured) -> dict[str, Any]:
    """Every other network against the first, and the first against both baselines."""
    first, *others = viewer.networks
    pairs = [(name, first) for name in others] + [(first, UNTRAINED), (first, CENTRE)]
    return {
        f"{a} against {b}": {
            key: paired_difference(values[a][key], values[b][key], lower_is_better=lower)
            for key, (_, _, lower) in MEASURES.items()
        }
        for a, b in pairs
    }


class _Values:
    """The measurements of every map, image by image."""

    def __init__(self) -> None:
        self._of: _Measured = {}
        self._overlaps: dict[str, list[Tensor]] = {}

    def add(
        self, name: str, heat: Tensor, area: Tensor, judge: nn.Module, image: Tensor, target: int
    ) -> None:
        """Measure one map (H, W) for the object at `area`; deletion and insertion use the network `judge`."""
        deletion, insertion = deletion_insertion(judge, image, heat, target)
        found = {
            "pointing": pointing(heat[None], area[None]), "energy": energy(heat[None], area[None]),
            "deletion": deletion, "insertion": insertion,
        }  # fmt: skip
        for key, value in found.items():
            self._of.setdefault(name, {}).setdefault(key, []).append(float(value))
        self._overlaps.setdefault(name, []).append(overlap(heat[None], area[None])[0])

    def at_best_thresholds(self, pictures: list[int]) -> tuple[dict[str, float], _Measured]:
        """Each map's threshold with the highest mean IoU; and all measures per image, with the IoU at it.

        `pictures` has the image index of each map in the order in which they were added.
        """
        thresholds, measured = {}, {}
        for name, rows in self._overlaps.items():
            table = _per_image(torch.stack(rows), pictures)
            best = int(table.mean(0).argmax())
            thresholds[name] = round(THRESHOLDS[best].item(), 2)
            own = {key: torch.tensor(kept, dtype=torch.float64) for key, kept in self._of[name].items()}
            measured[name] = {key: _per_image(kept, pictures).tolist() for key, kept in own.items()}
            measured[name]["iou"] = table[:, best].tolist()
        return thresholds, measured


def _per_image(values: Tensor, pictures: list[int]) -> Tensor:
    """The mean over the consecutive maps of each image: (maps, ...) -> (images, ...)."""
    _, counts = torch.tensor(pictures).unique_consecutive(return_counts=True)
    return torch.stack([own.mean(0) for own in values.split(counts.tolist())])


def _each(measured: _Measured, what: Callable[[list[float]], Any]) -> dict[str, dict[str, Any]]:
    return {name: {key: what(own[key]) for key in MEASURES} for name, own in measured.items()}


def _target(viewer: Viewer, first: nn.Module, image: Tensor, label: str) -> tuple[int, bool]:
    """The class of the label and True, or the first network's prediction and False."""
    found = [index for index, name in enumerate(viewer.classes) if name == label]
    if len(found) > 1:
        raise ConfigError(f"the label {label!r} is the name of several classes: {', '.join(map(str, found))}")
    if found:
        return found[0], True
    with torch.no_grad(), eval_mode(first):
        return int(logits_of(first(image[None])).argmax()), False


def evenly_spaced(items: Sequence, limit: int | None) -> list:
    """All of `items`, or `limit` of them, evenly spaced."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]
