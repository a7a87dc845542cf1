"""Shared parts of the figures: a page laid out in inches, text, colour bars, and writing to a file.

Figures only draw: they take arrays, not networks.
"""

import io
import os
import tempfile
import textwrap
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from cbam.errors import ConfigError, MissingExtraError, OutputError

FORMATS = (".png", ".svg", ".pdf")
TEXT, SMALL = 7.0, 6.0  # points
HEAT, STRENGTH, GATE = "inferno", "viridis", "PuOr_r"  # colour-blind safe, and readable in greyscale
# Maps are scaled to their own minimum and maximum.
EVIDENCE: dict[float, str] = {0: "least", 1: "most of the map"}
OPACITY = 0.6  # of a map over its image
MIN_REACH = 0.01  # minimum reach of a gate's colour scale, so that rounding is not amplified to a pattern
FINE_REACH = 0.03  # gates within this distance of their midpoint need three decimals
CHARACTER_WIDTH = 0.055  # average character width at TEXT points, in inches


class Page:
    """A figure of `width` x `height` inches, laid out from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, wide: float, high: float):
        """Add axes; position from the left and top edge, width and height, in inches."""
        W, H = self.width, self.height
        return self.figure.add_axes((left / W, (H - top - high) / H, wide / W, high / H))

    def say(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = TEXT,
        ha: str = "center",
        va: str = "center",
        turn: int = 0,
    ) -> None:
        """Add text at `x`, `y` inches from the top left corner."""
        where = x / self.width, 1 - y / self.height
        style = {"ha": ha, "va": va, "rotation": turn, "linespacing": 1.2, "parse_math": False}
        self.figure.text(*where, text, fontsize=size, **style)

    def bar(self, ax, colours: str, ticks: dict[float, str], title: str) -> None:
        """A horizontal colour bar that fills `ax`."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        mappable = ScalarMappable(Normalize(min(ticks), max(ticks)), colours)
        bar = self.figure.colorbar(mappable, cax=ax, orientation="horizontal")
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
        bar.outline.set_linewidth(0.4)  # pyright: ignore[reportCallIssue]
        ax.tick_params(labelsize=SMALL, length=2, width=0.4, pad=1)
        labels = ax.get_xticklabels()
        labels[0].set_ha("left")
        labels[-1].set_ha("right")
        ax.set_xlabel(title, fontsize=SMALL, labelpad=1)


def check_format(path: str | Path) -> Path:
    """Check that a figure can be written to this path, and return it.

    Raises:
        ConfigError: the suffix is not one of FORMATS.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"a figure must be one of {', '.join(FORMATS)}; got {path.name!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("a figure", "explain") from error
    return path


def save(figure, path: Path) -> Path:
    """Write a figure atomically, in the format of the suffix; the same figure gives the same bytes.

    Raises:
        OutputError: the file cannot be written.
    """
    content = to_bytes(figure, path.suffix.lower()[1:])
    try:
        _replace(path, content)
    except OSError as error:  # it names the temporary file, not `path`
        message = f"cannot write to {path}: {error.strerror or error}; give another path"
        raise OutputError(message) from error
    return path


def to_bytes(figure, kind: str) -> bytes:
    """The bytes of a figure as "png", "svg" or "pdf"."""
    import matplotlib

    buffer = io.BytesIO()
    no_date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "cbam"}), warnings.catch_warnings():
        # Characters of a name that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(buffer, format=kind, dpi=200, metadata=no_date)
    return buffer.getvalue()


def cells(ax, shape: tuple[int, int], values: Tensor, colours: str, low: float, high: float) -> None:
    """Draw values (h, w) as cells that cover the area of an H x W image."""
    H, W = shape
    over = (-0.5, W - 0.5, H - 0.5, -0.5)
    ax.imshow(values.float().numpy(), cmap=colours, vmin=low, vmax=high, interpolation="nearest", extent=over)


def show(ax, image: Tensor) -> None:
    """Draw an image, (3, H, W) or (1, H, W)."""
    ax.imshow(pixels(image), vmin=0, vmax=1, interpolation="nearest")


def show_heat(ax, image: Tensor, heat: Tensor, *, opacity: float = OPACITY, threshold: float = 0.0) -> None:
    """Draw a map (H, W) in [0, 1] over its image in greyscale."""
    blended = blend(image, heat, opacity=opacity, threshold=threshold)
    ax.imshow(blended, vmin=0, vmax=1, interpolation="nearest")


def blend(
    image: Tensor, heat: Tensor, colours: str = HEAT, *, opacity: float = OPACITY, threshold: float = 0.0
):
    """Blend a map (H, W) in [0, 1] in colour over the greyscale image: float array (H, W, 3) in [0, 1].

    Pixels below `threshold` stay grey.
    """
    from matplotlib import colormaps

    grey = pixels(image).mean(2, keepdims=True)
    coloured = (1 - opacity) * grey + opacity * colormaps[colours](heat.float().numpy())[..., :3]
    shown = (heat >= threshold).numpy()[..., None]
    return coloured * shown + grey * ~shown


def outline(
    ax, box: tuple[float, float, float, float], colour: str = "white", thickness: float = 0.8
) -> None:
    """Draw a box, x0, y0, x1, y1 in pixels; thickness in points, with a black edge for contrast."""
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    for edge, thick in (("black", thickness + 0.8), (colour, thickness)):
        corner = (x0 - 0.5, y0 - 0.5)  # imshow puts the centre of pixel 0 at 0
        ax.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=thick))


def remove_ticks(ax) -> None:
    """Remove the ticks, and the frame if nothing is drawn."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_linewidth(0.4)
        spine.set_visible(bool(ax.images))


def add_caption(ax, text: str, size: float = TEXT) -> None:
    """Write text under a cell."""
    ax.set_xlabel(text, fontsize=size, labelpad=2.5, linespacing=1.1, parse_math=False)


def truncate(text: str, inches: float) -> str:
    """Truncate `text` to this length."""
    fits = max(4, int(inches / CHARACTER_WIDTH))
    return text if len(text) <= fits else f"{text[: fits - 1]}\N{HORIZONTAL ELLIPSIS}"


def truncate_middle(text: str, inches: float) -> str:
    """Truncate `text` in the middle to this length, since file names often differ only at the end."""
    fits = max(4, int(inches / CHARACTER_WIDTH))
    if len(text) <= fits:
        return text
    end = (fits - 1) // 2
    return f"{text[: fits - 1 - end]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def wrap(label: str, inches: float) -> str:
    """Wrap `label` to at most two lines of this length."""
    fits = max(4, int(inches / CHARACTER_WIDTH))
    lines = textwrap.wrap(label, fits, max_lines=2, placeholder="\N{HORIZONTAL ELLIPSIS}")
    return "\n".join(truncate(line, inches) for line in lines)


def pixels(image: Tensor):
    """Convert (C, H, W) uint8 or float to a float array (H, W, 3) in [0, 1]."""
    image = image / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def gate_reach(gates: Iterable[tuple[Tensor, float]]) -> float:
    """The largest distance of any gate from its midpoint; takes pairs (gate, midpoint)."""
    reach = max((float((gate - middle).abs().max()) for gate, middle in gates), default=0.0)
    return max(reach, MIN_REACH)


def factor(value: float, reach: float) -> str:
    """Format a gate value; `reach` is the largest distance of the gates from their midpoint."""
    return f"{value:.{2 if reach > FINE_REACH else 3}f}"


def describe_midpoint(middles: Iterable[float]) -> str:
    """What the midpoint of the gates' range means; in the paper's form it halves the map."""
    neutral = all(middle == 1 for middle in middles)
    return "changes nothing" if neutral else "middle of the range;\n1 changes nothing"


def describe_channels(largest: Iterable[float], smallest: Iterable[float]) -> tuple[str, str]:
    """Descriptions of the channels with the largest gates and of those with the smallest."""
    upwards = _by_effect(largest, "raised most", "kept most", "with the largest gates")
    return upwards, _by_effect(smallest, "raised least", "lowered most", "with the smallest gates")


def _by_effect(gates: Iterable[float], above: str, below: str, mixed: str) -> str:
    """`above` if all gates are above 1, `below` if all are below, else `mixed`."""
    gates = list(gates)
    if all(gate < 1 for gate in gates):
        return below
    return above if all(gate > 1 for gate in gates) else mixed


def _replace(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
