"""A page for figures: cells laid out in inches, text, colour bars; and writing it to a file.

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
HEAT, STRENGTH, GATE = "inferno", "viridis", "PuOr_r"  # told apart with any colour vision, and in grey
# Maps come scaled to their own minimum and maximum.
EVIDENCE: dict[float, str] = {0: "least", 1: "most of the map"}
OPACITY = 0.6  # of a map over its image
LEAST = 0.01  # reach of a scale of gates: rounding is not blown up to a pattern
FINE = 0.03  # gates this near to their middle are alike in two digits
CHARACTER = 0.055  # inches, of a word of TEXT points on average


class Page:
    """A figure of `width` x `height` inches, laid out from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, wide: float, high: float):
        """New axes: inches from the left and from the top, width and height."""
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
        """Words at `x`, `y` inches from the top left corner."""
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
    """The path of a figure, if its ending says how to write it and matplotlib is there.

    Raises:
        ConfigError: an ending that is not one of FORMATS.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"a figure is written as {', '.join(FORMATS)}; got {path.name!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("a figure", "explain") from error
    return path


def save(figure, path: Path) -> Path:
    """Write a figure by the ending of `path`, all of it or nothing; the same figure gives the same bytes.

    Raises:
        OutputError: it cannot be written.
    """
    content = rendered(figure, path.suffix.lower()[1:])
    try:
        _replace(path, content)
    except OSError as error:  # it names a file that lies beside for a moment
        told = f"cannot write to {path}: {error.strerror or error}; give another path"
        raise OutputError(told) from error
    return path


def rendered(figure, kind: str) -> bytes:
    """A figure as a file of this kind: "png", "svg" or "pdf"."""
    import matplotlib

    buffer = io.BytesIO()
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "cbam"}), warnings.catch_warnings():
        # A name may have letters that the font lacks: they are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(buffer, format=kind, dpi=200, metadata=dated)
    return buffer.getvalue()


def cells(ax, shape: tuple[int, int], values: Tensor, colours: str, low: float, high: float) -> None:
    """Draw (h, w) as cells over the area of an image of H x W pixels."""
    H, W = shape
    over = (-0.5, W - 0.5, H - 0.5, -0.5)
    ax.imshow(values.float().numpy(), cmap=colours, vmin=low, vmax=high, interpolation="nearest", extent=over)


def show(ax, image: Tensor) -> None:
    """Draw an image, (3, H, W) or (1, H, W)."""
    ax.imshow(pixels(image), vmin=0, vmax=1, interpolation="nearest")


def show_heat(ax, image: Tensor, heat: Tensor, *, opacity: float = OPACITY, threshold: float = 0.0) -> None:
    """Draw a map (H, W) in [0, 1] over its image, which turns grey."""
    blended = blend(image, heat, opacity=opacity, threshold=threshold)
    ax.imshow(blended, vmin=0, vmax=1, interpolation="nearest")


def blend(
    image: Tensor, heat: Tensor, colours: str = HEAT, *, opacity: float = OPACITY, threshold: float = 0.0
):
    """A map (H, W) in [0, 1] in colour over the image in grey: float array (H, W, 3) in [0, 1].

    What is below `threshold` stays grey.
    """
    from matplotlib import colormaps

    grey = pixels(image).mean(2, keepdims=True)
    coloured = (1 - opacity) * grey + opacity * colormaps[colours](heat.float().numpy())[..., :3]
    shown = (heat >= threshold).numpy()[..., None]
    return coloured * shown + grey * ~shown


def outline(
    ax, box: tuple[float, float, float, float], colour: str = "white", thickness: float = 0.8
) -> None:
    """Draw a box, x0, y0, x1, y1 in pixels, in points of thickness; a black seam shows it on any image."""
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    for edge, thick in (("black", thickness + 0.8), (colour, thickness)):
        corner = (x0 - 0.5, y0 - 0.5)  # imshow puts the middle of pixel 0 at 0
        ax.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=thick))


def bare(ax) -> None:
    """Take the ticks off, and the frame where nothing is drawn."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_linewidth(0.4)
        spine.set_visible(bool(ax.images))


def under(ax, text: str, size: float = TEXT) -> None:
    """Words under a cell."""
    ax.set_xlabel(text, fontsize=size, labelpad=2.5, linespacing=1.1, parse_math=False)


def cut(text: str, inches: float) -> str:
    """`text`, cut to what fits into this length."""
    fits = max(4, int(inches / CHARACTER))
    return text if len(text) <= fits else f"{text[: fits - 1]}\N{HORIZONTAL ELLIPSIS}"


def cut_middle(text: str, inches: float) -> str:
    """`text`, cut in its middle to what fits into this length: files are told apart by their ends."""
    fits = max(4, int(inches / CHARACTER))
    if len(text) <= fits:
        return text
    end = (fits - 1) // 2
    return f"{text[: fits - 1 - end]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def wrap(label: str, inches: float) -> str:
    """`label` on at most two lines of this length."""
    fits = max(4, int(inches / CHARACTER))
    lines = textwrap.wrap(label, fits, max_lines=2, placeholder="\N{HORIZONTAL ELLIPSIS}")
    return "\n".join(cut(line, inches) for line in lines)


def pixels(image: Tensor):
    """(C, H, W) uint8 or float -> float array (H, W, 3) in [0, 1]."""
    image = image / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def gate_reach(gates: Iterable[tuple[Tensor, float]]) -> float:
    """How far a scale that holds all gates reaches to either side of their middles, which stand with them."""
    reach = max((float((gate - middle).abs().max()) for gate, middle in gates), default=0.0)
    return max(reach, LEAST)


def factor(value: float, reach: float) -> str:
    """A gate for a reader, of gates that lie up to `reach` from their middle."""
    return f"{value:.{2 if reach > FINE else 3}f}"


def in_words(middles: Iterable[float]) -> str:
    """What gates in the middle of their range do: in the paper's form they halve the map."""
    neutral = all(middle == 1 for middle in middles)
    return "changes nothing" if neutral else "middle of the range;\n1 changes nothing"


def of_channels(largest: Iterable[float], smallest: Iterable[float]) -> tuple[str, str]:
    """The channels whose largest gates are shown, and those of the smallest, by what all of these do."""
    upwards = _by_effect(largest, "raised most", "kept most", "of the largest gates")
    return upwards, _by_effect(smallest, "raised least", "lowered most", "of the smallest gates")


def _by_effect(gates: Iterable[float], above: str, below: str, mixed: str) -> str:
    """`above` where all gates are above 1, `below` where all are below, else `mixed`."""
    gates = list(gates)
    if all(gate < 1 for gate in gates):
        return below
    return above if all(gate > 1 for gate in gates) else mixed


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
