"""The comparison figure: what two networks look at, and what attention did on the way.

It only draws: rows hold arrays, no network.
"""

import io
import os
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from cbam.errors import ConfigError, InputError, MissingExtraError
from cbam.explain.maps import energy_inside

FORMATS = (".png", ".svg", ".pdf")

# Inches. The whole is as wide as the text of a page.
_WIDTH, _LEFT, _RIGHT, _GAP = 7.0, 0.30, 0.06, 0.06
_CELL = (_WIDTH - _LEFT - _RIGHT - 6 * _GAP) / 7  # seven columns
_HEAD, _CAPTION, _LINE, _FOOT = 0.50, 0.08, 0.115, 0.50
_TEXT, _SMALL = 7.0, 6.0  # points

_HEAT, _STRENGTH, _GATE = "inferno", "viridis", "PuOr_r"  # told apart with any colour vision, and in grey


@dataclass(frozen=True, eq=False)
class Row:
    """One image as the figure shows it. H x W are pixels of the image, h x w of the block's feature map.

    Feature maps are means over channels of absolute activations; what is None is left out.
    """

    label: str
    image: Tensor  # (3, H, W) or (1, H, W), uint8 or float in [0, 1]
    plain_map: Tensor  # (H, W) in [0, 1]
    refined_map: Tensor  # (H, W) in [0, 1]
    plain_probability: float  # of the true class
    refined_probability: float
    box: tuple[float, float, float, float] | None = None  # x0, y0, x1, y1 in pixels
    before: Tensor | None = None  # (h, w)
    after_what: Tensor | None = None  # (h, w)
    after_where: Tensor | None = None  # (h, w)
    spatial_gate: Tensor | None = None  # (h, w) in (0, gain)
    block: str = ""
    gain: float = 1.0  # half of it is the middle of the gate's scale: 1 for the identity start


def comparison_figure(rows: Sequence[Row], path: str | Path, *, refined: str = "CBAM") -> Path:
    """Draw one row per image and write it to `path`, as PNG, SVG or PDF by its ending; returns the path.

    Columns: the image with its true box, Grad-CAM without and with attention (under each the probability of
    the true class and the share of the map inside the box), the block's feature map before, after *what* and
    after *where* on one scale per row, and the spatial gate on one scale for all rows.

    Args:
        rows: from `compare_rows`.
        path: where to write; replaced in one step, so never half written.
        refined: what to call the network with attention.

    Raises:
        ConfigError: an ending that is not one of .png, .svg, .pdf.
        InputError: no rows, or a row whose arrays do not fit together.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"a figure is written as {', '.join(FORMATS)}; got {path.name!r}")
    if not rows:
        raise InputError("comparison_figure: no rows to draw")
    for row in rows:
        _check(row)
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError.of("a figure", "explain") from error

    figure = _draw(rows, refined)
    buffer = io.BytesIO()
    kind = path.suffix.lower()[1:]
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)  # the same rows, the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "cbam"}):
        figure.savefig(buffer, format=kind, dpi=200, metadata=dated)
    _replace(path, buffer.getvalue())
    return path


class _Page:
    """A figure laid out in inches from its top left corner, one row of cells per picture."""

    def __init__(self, rows: Sequence[Row], columns: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.tall = [_CELL * row.image.shape[-2] / row.image.shape[-1] for row in rows]
        caption = _CAPTION + _LINE * (2 if any(row.box for row in rows) else 1)
        self.tops = [_HEAD + sum(self.tall[:r]) + r * caption for r in range(len(rows) + 1)]
        self.width = _LEFT + self.length(columns) + _RIGHT
        self.height = self.tops[-1] + _FOOT
        self.figure = Figure(figsize=(self.width, self.height), facecolor="white")
        FigureCanvasAgg(self.figure)

    @staticmethod
    def length(columns: int) -> float:
        return columns * _CELL + max(columns - 1, 0) * _GAP

    def axes(self, column: int, top: float, high: float, wide: int = 1):
        """New axes from `column` on, over `wide` columns."""
        left, bottom = _LEFT + column * (_CELL + _GAP), self.height - top - high
        W, H = self.width, self.height
        return self.figure.add_axes((left / W, bottom / H, self.length(wide) / W, high / H))

    def say(
        self, x: float, y: float, text: str, *, size: float = _TEXT, va: str = "center", turn: int = 0
    ) -> None:
        where = x / self.width, 1 - y / self.height
        style = {"ha": "center", "va": va, "rotation": turn, "linespacing": 1.2, "parse_math": False}
        self.figure.text(*where, text, fontsize=size, **style)


def _draw(rows: Sequence[Row], refined: str):
    """The figure, not yet written anywhere."""
    columns = _columns(rows, refined)
    page = _Page(rows, len(columns))
    scale = _gate_scale(rows)
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            ax = page.axes(c, page.tops[r], page.tall[r])
            column.paint(ax, row, scale)
            _bare(ax)
        page.say(_LEFT / 2, page.tops[r] + page.tall[r] / 2, _wrap(row.label, page.tall[r]), turn=90)
    for c, column in enumerate(columns):
        page.say(_LEFT + c * (_CELL + _GAP) + _CELL / 2, _HEAD - 0.05, column.title, va="baseline")
    _bracket(page, columns, f"inside {rows[0].block}, with {refined}")
    _scales(page, columns, scale)
    return page.figure


@dataclass(frozen=True)
class _Column:
    title: str
    paint: Callable[..., None]  # (axes, row, scale of the gates)
    scale: str = ""  # "heat", "strength" or "gate"; neighbours of one scale share a bar


def _columns(rows: Sequence[Row], refined: str) -> list[_Column]:
    """A column for everything that some row has."""

    def heat(which: str) -> Callable[..., None]:
        return lambda ax, row, _: _paint_heat(
            ax, row, getattr(row, f"{which}_map"), getattr(row, f"{which}_probability")
        )

    columns = [
        _Column("input", _paint_input),
        _Column("Grad-CAM\nplain", heat("plain"), "heat"),
        _Column(f"Grad-CAM\n{_cut(f'with {refined}', _CELL)}", heat("refined"), "heat"),
    ]
    for key in ("before", "after_what", "after_where"):
        if any(getattr(row, key) is not None for row in rows):
            paint = partial(_paint_strength, key=key)
            columns.append(_Column(key.replace("_", " "), paint, "strength"))
    if any(row.spatial_gate is not None for row in rows):
        columns.append(_Column("spatial gate", _paint_gate, "gate"))
    return columns


def _paint_input(ax, row: Row, _) -> None:
    ax.imshow(_pixels(row.image), vmin=0, vmax=1, interpolation="nearest")
    if row.box is not None:
        _outline(ax, row.box)


def _outline(ax, box: tuple[float, float, float, float]) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    for colour, thick in (("black", 1.6), ("white", 0.8)):  # seen on any picture
        corner = (x0 - 0.5, y0 - 0.5)  # imshow puts the middle of pixel 0 at 0
        ax.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=thick))


def _paint_heat(ax, row: Row, heat: Tensor, probability: float) -> None:
    from matplotlib import colormaps

    grey = _pixels(row.image).mean(2, keepdims=True)
    colour = colormaps[_HEAT](heat.float().numpy())[..., :3]
    ax.imshow(0.4 * grey + 0.6 * colour, vmin=0, vmax=1, interpolation="nearest")
    lines = [f"p = {probability:.2f}"]
    if row.box is not None:
        _outline(ax, row.box)
        share = float(energy_inside(heat[None], torch.tensor([row.box]))[0])
        lines.append("empty map" if share != share else f"{100 * share:.0f} % in box")
    _under(ax, "\n".join(lines))


def _paint_strength(ax, row: Row, _, key: str) -> None:
    shown = getattr(row, key)
    if shown is None:
        return
    maps = [m for m in (row.before, row.after_what, row.after_where) if m is not None]
    top = max(float(m.max()) for m in maps)
    _cells(ax, row, shown, _STRENGTH, 0, top or 1)
    _under(ax, f"mean {float(shown.mean()):#.3g}")


def _paint_gate(ax, row: Row, scale: tuple[float, float]) -> None:
    if row.spatial_gate is None:
        return
    gate = row.spatial_gate.float()
    middle, reach = scale
    _cells(ax, row, gate, _GATE, middle - reach, middle + reach)
    _under(ax, f"{float(gate.min()):.2f} to {float(gate.max()):.2f}")


def _cells(ax, row: Row, values: Tensor, colours: str, low: float, high: float) -> None:
    """Draw (h, w) as cells over the area of the row's image."""
    H, W = row.image.shape[-2:]
    over = (-0.5, W - 0.5, H - 0.5, -0.5)
    ax.imshow(values.float().numpy(), cmap=colours, vmin=low, vmax=high, interpolation="nearest", extent=over)


def _gate_scale(rows: Sequence[Row]) -> tuple[float, float]:
    """The middle of the gates' colour scale and how far it reaches to either side, one for all rows."""
    middle = rows[0].gain / 2
    gates = [row.spatial_gate for row in rows if row.spatial_gate is not None]
    reach = max((float((gate - middle).abs().max()) for gate in gates), default=0.0)
    return middle, max(reach, 0.01)  # so that rounding is not blown up to a pattern


def _scales(page: _Page, columns: list[_Column], scale: tuple[float, float]) -> None:
    """A colour bar under every group of columns that share one."""
    middle, reach = scale
    gates = (middle - reach, middle, middle + reach)
    bars = {
        "heat": (_HEAT, {0: "0", 1: "largest of the map"}, "evidence for the true class"),
        "strength": (_STRENGTH, {0: "0", 1: "largest of the row"}, "mean over channels of |activation|"),
        "gate": (_GATE, {value: f"{value:.2f}" for value in gates}, "factor"),
    }
    top = page.tops[-1] + 0.08
    for kind, group in groupby(enumerate(columns), lambda numbered: numbered[1].scale):
        places = [c for c, _ in group]
        if kind:
            _bar(page, page.axes(places[0], top, 0.07, len(places)), *bars[kind])
    page.say(_LEFT + _CELL / 2, top + 0.08, "p: probability\nof the true class", size=_SMALL)


def _bar(page: _Page, ax, colours: str, ticks: dict[float, str], title: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    mappable = ScalarMappable(Normalize(min(ticks), max(ticks)), colours)
    bar = page.figure.colorbar(mappable, cax=ax, orientation="horizontal")
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.outline.set_linewidth(0.4)  # pyright: ignore[reportCallIssue]
    ax.tick_params(labelsize=_SMALL, length=2, width=0.4, pad=1)
    labels = ax.get_xticklabels()
    labels[0].set_ha("left")
    labels[-1].set_ha("right")
    ax.set_xlabel(title, fontsize=_SMALL, labelpad=1)


def _bracket(page: _Page, columns: list[_Column], text: str) -> None:
    """A line over the columns that show the inside of one block, and its name."""
    inside = sum(column.scale in ("strength", "gate") for column in columns)
    if not inside:
        return
    ax = page.axes(len(columns) - inside, 0.06, 0.14, inside)
    ax.set_axis_off()
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.plot([0, 1], [0, 0], color="black", linewidth=0.6, clip_on=False)
    ax.text(0.5, 0.3, _cut(text, page.length(inside)), fontsize=_TEXT, ha="center", parse_math=False)


def _bare(ax) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_linewidth(0.4)
        spine.set_visible(bool(ax.images))


def _under(ax, text: str) -> None:
    ax.set_xlabel(text, fontsize=_TEXT, labelpad=2.5, linespacing=1.1)


def _cut(text: str, inches: float) -> str:
    """`text`, cut to what fits into this length."""
    fits = max(4, int(inches / 0.055))
    return text if len(text) <= fits else f"{text[: fits - 1]}\N{HORIZONTAL ELLIPSIS}"


def _wrap(label: str, inches: float) -> str:
    """`label` on at most two lines of this length."""
    fits = max(4, int(inches / 0.055))
    lines = textwrap.wrap(label, fits, max_lines=2, placeholder="\N{HORIZONTAL ELLIPSIS}")
    return "\n".join(_cut(line, inches) for line in lines)


def _pixels(image: Tensor):
    """(C, H, W) uint8 or float -> float array (H, W, 3) in [0, 1]."""
    image = image / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


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


def _replace(path: Path, content: bytes) -> None:
    """Write all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
