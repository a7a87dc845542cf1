"""The detection figure: what each detector finds in an image, and the evidence for one of its boxes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cbam.errors import InputError
from cbam.explain import page as drawing
from cbam.explain.detecting import Detection, Finds
from cbam.explain.maps import METHODS
from cbam.explain.page import SMALL, Page

# Inches. Two cells are as wide as one column of a page, four as the whole page.
_WIDE, _LEFT, _GAP, _HEAD, _CAPTION, _FOOT = 1.66, 0.22, 0.05, 0.36, 0.30, 0.40
_FLAT, _TALL = 0.4, 1.5  # range of a cell's height / width; other images are drawn smaller to fit
_MAX_SIDE = 900  # pixels of the longer side of an image in the figure

_TAG, _LETTER, _LINE = 5.5, 0.043, 0.095  # labels: font size in points, letter width and line in inches
# Okabe and Ito's colour-blind safe colours. Black and white are reserved for the chosen box.
_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
_DARK = ("#009E73", "#D55E00", "#0072B2")  # these take white letters


def detection_figure(detections: Sequence[Detection], path: str | Path) -> Path:
    """Draw one row per image and write the figure to `path`, as PNG, SVG or PDF by suffix; returns the path.

    Columns: the boxes of each detector, labelled with number, class and score if there is room, the chosen
    one with a thick outline; then each detector's map of the evidence for that box.

    Args:
        detections: from `detect`, all with the same detectors.
        path: the output file; replaced atomically.

    Raises:
        ConfigError: the suffix is not .png, .svg or .pdf.
        InputError: nothing to draw, or different detectors.
        MissingExtraError: matplotlib is not installed. OutputError: the figure cannot be written.
    """
    path = drawing.check_format(path)
    if not detections:
        raise InputError("detection_figure: no image to draw")
    names = [one.network for one in detections[0].finds]
    if any([one.network for one in detection.finds] != names for detection in detections):
        raise InputError("detection_figure: the images were processed by different detectors")
    return drawing.save(_Rows([_downscaled(one) for one in detections], names).figure, path)


class _Rows(Page):
    def __init__(self, detections: Sequence[Detection], names: list[str]) -> None:
        tall = [_WIDE * _proportion(one) for one in detections]
        tops = [_HEAD + sum(tall[:r]) + r * _CAPTION for r in range(len(tall) + 1)]
        columns = 2 * len(names)
        super().__init__(_LEFT + columns * (_WIDE + _GAP), tops[-1] + _FOOT)
        method = METHODS[detections[0].method]
        titles = [f"{n} finds" for n in names] + [f"{method} of a box\n{n}" for n in names]
        for c, title in enumerate(titles):
            words = "\n".join(drawing.truncate(line, _WIDE) for line in title.split("\n"))
            self.say(self._left(c) + _WIDE / 2, _HEAD - 0.05, words, va="bottom")
        for detection, top, high in zip(detections, tops, tall, strict=False):
            label = drawing.truncate_middle(detection.name, high)
            self.say(_LEFT / 2, top + high / 2, label, size=SMALL, turn=90)
            for c, finds in enumerate(detection.finds):
                self._boxes(self.axes(self._left(c), top, _WIDE, high), detection, finds, high)
                ax = self.axes(self._left(len(names) + c), top, _WIDE, high)
                self._evidence(ax, detection, finds)
        ax = self.axes(self._left(len(names)), tops[-1] + 0.04, len(names) * (_WIDE + _GAP) - _GAP, 0.06)
        self.bar(ax, drawing.HEAT, drawing.EVIDENCE, "evidence for the box")
        note = ("number, class, score;", "the thick box is the chosen one")
        for line, words in enumerate(note if len(names) == 1 else (" ".join(note),)):  # two lines if narrow
            self.say(self._left(0), tops[-1] + 0.1 + 0.14 * line, words, size=SMALL, ha="left")

    @staticmethod
    def _left(column: int) -> float:
        return _LEFT + column * (_WIDE + _GAP)

    def _boxes(self, ax, detection: Detection, finds: Finds, high: float) -> None:
        drawing.show(ax, detection.image)
        H, W = detection.image.shape[1:]
        pixels = max(W / _WIDE, H / high)  # image pixels per inch
        order = sorted(range(len(finds.boxes)), key=lambda i: i != finds.chosen)  # the chosen one first
        for i in reversed(order):
            drawing.outline(ax, _box(finds, i), _colour(finds, i), 2.2 if i == finds.chosen else 0.9)
        taken: list[tuple[float, float, float, float]] = []
        for i in order:
            for text in (_label(detection, finds, i), str(i + 1)):
                place = _free_position(_box(finds, i), text, pixels, (H, W), taken)
                if place is not None:
                    taken.append(place)
                    _tag(ax, place, text, _colour(finds, i))
                    break
        drawing.remove_ticks(ax)
        drawing.add_caption(ax, drawing.truncate(_summary(detection, finds), _WIDE))

    def _evidence(self, ax, detection: Detection, finds: Finds) -> None:
        if finds.heat is None or finds.chosen is None:
            drawing.show(ax, detection.image.float().mean(0, keepdim=True) / 255)
            words = "does not find it" if any(one.heat is not None for one in detection.finds) else "no box"
        else:
            drawing.show_heat(ax, detection.image, finds.heat)
            drawing.outline(ax, _box(finds, finds.chosen))
            words = _label(detection, finds, finds.chosen)
        drawing.remove_ticks(ax)
        drawing.add_caption(ax, drawing.truncate(words, _WIDE))


def _free_position(
    box: Sequence[float], text: str, pixels: float, size: tuple[int, int], taken: Sequence[Sequence[float]]
) -> tuple[float, float, float, float] | None:
    """The first free position in the image for the label of a box, x0, y0, x1, y1 in pixels."""
    wide, high = (_LETTER * len(text) + 0.03) * pixels, _LINE * pixels
    for x, y in _positions(box, wide, high):
        place = (x, y, x + wide, y + high)
        inside = x >= 0 and y >= 0 and x + wide <= size[1] and y + high <= size[0]
        if inside and not any(_overlap(place, other) for other in taken):
            return place
    return None


def _positions(box: Sequence[float], wide: float, high: float) -> Iterator[tuple[float, float]]:
    """Candidate top left corners of a label: above the box, below it, and in its corners."""
    x0, y0, x1, y1 = box
    for x in (x0, x1 - wide):
        for y in (y0 - high, y1, y0, y1 - high):
            yield x, y


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _tag(ax, place: Sequence[float], text: str, colour: str) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = (side - 0.5 for side in place)  # imshow puts the centre of pixel 0 at 0
    ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=colour, linewidth=0, zorder=3))
    style = {"ha": "center", "va": "center_baseline", "parse_math": False, "zorder": 4}
    letters = "white" if colour in _DARK else "black"
    ax.text((x0 + x1) / 2, (y0 + y1) / 2, text, fontsize=_TAG, color=letters, **style)


def _label(detection: Detection, finds: Finds, i: int) -> str:
    return f"{i + 1} {detection.class_of(finds.labels[i])} {float(finds.scores[i]):.2f}"


def _summary(detection: Detection, finds: Finds) -> str:
    counts = Counter(detection.class_of(label) for label in finds.labels)
    return ", ".join(name + f" × {n}" * (n > 1) for name, n in counts.most_common()) or "nothing"


def _colour(finds: Finds, i: int) -> str:
    return _COLOURS[(int(finds.labels[i]) - 1) % len(_COLOURS)]


def _box(finds: Finds, i: int) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = finds.boxes[i].tolist()
    return x0, y0, x1, y1


def _proportion(detection: Detection) -> float:
    H, W = detection.image.shape[1:]
    return min(max(H / W, _FLAT), _TALL)


def _downscaled(detection: Detection) -> Detection:
    """The detection scaled down to the resolution of the figure."""
    H, W = detection.image.shape[1:]
    scale = min(1.0, _MAX_SIDE / max(H, W))
    if scale == 1:
        return detection
    size = [max(1, round(side * scale)) for side in (H, W)]

    def smaller(values: Tensor) -> Tensor:
        return F.interpolate(values[None].float(), size, mode="area")[0]

    finds = tuple(
        Finds(
            one.network,
            one.boxes * scale,
            one.labels,
            one.scores,
            one.chosen,
            None if one.heat is None else smaller(one.heat[None])[0],
        )
        for one in detection.finds
    )
    image = smaller(detection.image).round().to(torch.uint8)
    return Detection(detection.name, image, finds, detection.classes, detection.method)
