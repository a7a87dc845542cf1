"""The comparison figure: where two networks look, and what attention does to the feature map."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from cbam.errors import InputError
from cbam.explain import page as drawing
from cbam.explain.maps import energy_inside
from cbam.explain.page import SMALL, Page

# Inches. The figure is as wide as the text of a page.
_WIDTH, _LEFT, _RIGHT, _GAP = 7.0, 0.30, 0.06, 0.06
_CELL = (_WIDTH - _LEFT - _RIGHT - 6 * _GAP) / 7  # seven columns
_HEAD, _CAPTION, _LINE, _FOOT = 0.50, 0.08, 0.115, 0.50


@dataclass(frozen=True, eq=False)
class Row:
    """One row of the figure. H x W are pixels of the image, h x w of the block's feature map.

    Feature maps are means over channels of absolute activations; parts that are None are left out.
    """

    label: str
    image: Tensor  # (3, H, W) or (1, H, W), uint8 or float in [0, 1]
    plain_map: Tensor  # (H, W) in [0, 1]
    refined_map: Tensor  # (H, W) in [0, 1]
    plain_probability: float  # of the true class
    refined_probability: float
    box: tuple[float, float, float, float] | None = None  # x0, y0, x1, y1 in pixels
    before: Tensor | None = None  # (h, w)
    after: tuple[tuple[str, Tensor], ...] = ()  # ("what", (h, w)), ... in the order of the block's gates
    spatial_gate: Tensor | None = None  # (h, w) in (0, gain)
    block: str = ""
    middle: float = 0.5  # midpoint of the gate's range: 0.5 for a sigmoid, 1 for the identity start


def comparison_figure(rows: Sequence[Row], path: str | Path, *, refined: str = "CBAM") -> Path:
    """Draw one row per image and write the figure to `path`, as PNG, SVG or PDF by suffix; returns the path.

    Columns: the image with its true box, Grad-CAM without and with attention (with the probability of the
    true class and the share of the map inside the box), the block's feature map before and after each of its
    gates, in their order and on one scale per row, and the spatial gate on one scale for all rows.

    Args:
        rows: from `compare_rows`.
        path: the output file; replaced atomically, so it is never half written.
        refined: display name of the network with attention.

    Raises:
        ConfigError: the suffix is not .png, .svg or .pdf.
        InputError: no rows, or a row whose arrays do not match.
        MissingExtraError: matplotlib is not installed. OutputError: the figure cannot be written.
    """
    path = drawing.check_format(path)
    if not rows:
        raise InputError("comparison_figure: no rows to draw")
    for row in rows:
        _check(row)
    return drawing.save(_draw(rows, refined), path)


class _Grid(Page):
    """A page with one row of cells per image."""

    def __init__(self, rows: Sequence[Row], columns: int) -> None:
        self.tall = [_CELL * row.image.shape[-2] / row.image.shape[-1] for row in rows]
        caption = _CAPTION + _LINE * (2 if any(row.box for row in rows) else 1)
        self.tops = [_HEAD + sum(self.tall[:r]) + r * caption for r in range(len(rows) + 1)]
        super().__init__(_LEFT + self.length(columns) + _RIGHT, self.tops[-1] + _FOOT)

    @staticmethod
    def length(columns: int) -> float:
        return columns * _CELL + max(columns - 1, 0) * _GAP

    def cell(self, column: int, top: float, high: float, wide: int = 1):
        """New axes that span `wide` columns from `column` on."""
        return self.axes(_LEFT + column * (_CELL + _GAP), top, self.length(wide), high)


def _draw(rows: Sequence[Row], refined: str):
    """The figure as a matplotlib object."""
    columns = _columns(rows, refined)
    page = _Grid(rows, len(columns))
    scale = _gate_scale(rows)
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            ax = page.cell(c, page.tops[r], page.tall[r])
            column.paint(ax, row, scale)
            drawing.remove_ticks(ax)
        label = drawing.wrap(row.label, page.tall[r])
        page.say(_LEFT / 2, page.tops[r] + page.tall[r] / 2, label, turn=90)
    for c, column in enumerate(columns):
        page.say(_LEFT + c * (_CELL + _GAP) + _CELL / 2, _HEAD - 0.05, column.title, va="baseline")
    _bracket(page, columns, f"inside {rows[0].block}, with {refined}")
    _scales(page, columns, scale)
    return page.figure


@dataclass(frozen=True)
class _Column:
    title: str
    paint: Callable[..., None]  # (axes, row, scale of the gates)
    scale: str = ""  # "heat", "strength" or "gate"; adjacent columns with the same scale share a colour bar


def _columns(rows: Sequence[Row], refined: str) -> list[_Column]:
    """One column for each part that any row has."""

    def heat(which: str) -> Callable[..., None]:
        return lambda ax, row, _: _paint_heat(
            ax, row, getattr(row, f"{which}_map"), getattr(row, f"{which}_probability")
        )

    columns = [
        _Column("input", _paint_input),
        _Column("Grad-CAM\nplain", heat("plain"), "heat"),
        _Column(f"Grad-CAM\n{drawing.truncate(f'with {refined}', _CELL)}", heat("refined"), "heat"),
    ]
    if any(row.before is not None for row in rows):
        columns.append(_Column("before", partial(_paint_strength, key="before"), "strength"))
    for kind in dict.fromkeys(kind for row in rows for kind, _ in row.after):
        title = "after both" if kind == "both" else f"after {kind}"
        columns.append(_Column(title, partial(_paint_strength, key=kind), "strength"))
    if any(row.spatial_gate is not None for row in rows):
        columns.append(_Column("spatial gate", _paint_gate, "gate"))
    return columns


def _paint_input(ax, row: Row, _) -> None:
    drawing.show(ax, row.image)
    if row.box is not None:
        drawing.outline(ax, row.box)


def _paint_heat(ax, row: Row, heat: Tensor, probability: float) -> None:
    drawing.show_heat(ax, row.image, heat)
    lines = [f"p = {probability:.2f}"]
    if row.box is not None:
        drawing.outline(ax, row.box)
        share = float(energy_inside(heat[None], torch.tensor([row.box]))[0])
        lines.append("empty map" if share != share else f"{100 * share:.0f} % in box")
    drawing.add_caption(ax, "\n".join(lines))


def _paint_strength(ax, row: Row, _, key: str) -> None:
    maps = {key: value for key, value in (("before", row.before), *row.after) if value is not None}
    if key not in maps:
        return
    top = max(float(m.max()) for m in maps.values())
    drawing.cells(ax, _size(row), maps[key], drawing.STRENGTH, 0, top or 1)
    drawing.add_caption(ax, f"mean {float(maps[key].mean()):#.3g}")


def _paint_gate(ax, row: Row, scale: tuple[float, float]) -> None:
    if row.spatial_gate is None:
        return
    gate = row.spatial_gate.float()
    middle, reach = scale
    drawing.cells(ax, _size(row), gate, drawing.GATE, middle - reach, middle + reach)
    low, high = (drawing.factor(float(end), reach) for end in gate.aminmax())
    drawing.add_caption(ax, f"{low} to {high}")


def _size(row: Row) -> tuple[int, int]:
    return row.image.shape[-2], row.image.shape[-1]


def _gate_scale(rows: Sequence[Row]) -> tuple[float, float]:
    """The midpoint and reach of the colour scale that all rows share."""
    gates = [(row.spatial_gate, row.middle) for row in rows if row.spatial_gate is not None]
    return rows[0].middle, drawing.gate_reach(gates)


def _scales(page: _Grid, columns: list[_Column], scale: tuple[float, float]) -> None:
    """A colour bar under each group of columns with the same scale."""
    middle, reach = scale
    gates = (middle - reach, middle, middle + reach)
    bars = {
        "heat": (drawing.HEAT, drawing.EVIDENCE, "evidence for the true class"),
        "strength": (
            drawing.STRENGTH,
            {0: "0", 1: "largest of the row"},
            "mean over channels of |activation|",
        ),
        "gate": (drawing.GATE, {value: drawing.factor(value, reach) for value in gates}, "factor"),
    }
    top = page.tops[-1] + 0.08
    for kind, group in groupby(enumerate(columns), lambda numbered: numbered[1].scale):
        places = [c for c, _ in group]
        if kind:
            page.bar(page.cell(places[0], top, 0.07, len(places)), *bars[kind])
    page.say(_LEFT + _CELL / 2, top + 0.08, "p: probability\nof the true class", size=SMALL)


def _bracket(page: _Grid, columns: list[_Column], text: str) -> None:
    """A line and the block's name over the columns that show its feature maps and gate."""
    inside = sum(column.scale in ("strength", "gate") for column in columns)
    if not inside:
        return
    ax = page.cell(len(columns) - inside, 0.06, 0.14, inside)
    ax.set_axis_off()
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.plot([0, 1], [0, 0], color="black", linewidth=0.6, clip_on=False)
    words = drawing.truncate(text, page.length(inside))
    ax.text(0.5, 0.3, words, fontsize=drawing.TEXT, ha="center", parse_math=False)


def _check(row: Row) -> None:
    if row.image.dim() != 3 or row.image.shape[0] not in (1, 3):
        raise InputError(f"row {row.label!r}: image must be (3, H, W), got {tuple(row.image.shape)}")
    for name in ("plain_map", "refined_map"):
        shape = getattr(row, name).shape
        if shape != row.image.shape[1:]:
            raise InputError(
                f"row {row.label!r}: {name} must be as large as the image, {tuple(row.image.shape[1:])}, "
                f"got {tuple(shape)}"
            )
