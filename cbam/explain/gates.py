"""Statistics of a network's gates over a set of images: whether they do anything, and what they depend on.

Shapes: N images of K classes, a block's C channels, its h x w pixels.

The variance of a block's channel gates g[n, c] is the sum of three parts: the variance between channels in
the mean over all images, what classes add to it, and what single images add. A block whose gates vary only
by channel multiplies every image by the same factors, which the preceding convolution could do as well. The
variance of the spatial gates g[n, p] is that of the mean map (the same in every image), and the rest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cbam.errors import ConfigError, InputError
from cbam.explain import page as drawing
from cbam.explain.page import SMALL, Page
from cbam.explain.recording import Refinement, record
from cbam.surgery.effects import eval_mode

SATURATED = 0.02  # a gate in the first or last 2 % of its range has almost no gradient
IDLE = 0.01  # a block that changes its map by less than 1 % does next to nothing
MOSTLY_SATURATED = 0.5  # a block with a larger share of saturated gates is called saturated
FIXED = 0.95  # gates with a larger fixed share of variance are called the same for every image
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SAMPLE = 4096  # values kept of each image's spatial gate, evenly spaced


@dataclass(frozen=True)
class GateStatistics:
    """Statistics of one kind of gate of one block, over all images.

    Attributes:
        mean: mean of the values.
        quantiles: quantiles of the values, at QUANTILES.
        saturated: share of values in the first or last SATURATED of the range, 0 to twice the midpoint; None
            for gates without such a range.
        fixed: share of the variance that is the same in every image (between channels, or pixels), corrected
            for chance.
        by_class: share of the variance that classes explain beyond that, corrected for chance; None without
            classes, and for spatial gates.
    """

    mean: float
    quantiles: tuple[float, ...]
    saturated: float | None
    fixed: float
    by_class: float | None = None

    @property
    def by_image(self) -> float:
        """Share of the variance that is neither fixed nor explained by the class."""
        return max(0.0, 1 - self.fixed - (self.by_class or 0.0))


@dataclass(frozen=True)
class BlockStatistics:
    """What the attention of one block does.

    Attributes:
        change: norm of the difference between output and input, relative to the input; mean over images.
        middle: the midpoint of the gates' range.
    """

    name: str
    channels: int
    change: float
    middle: float
    what: GateStatistics | None
    where: GateStatistics | None

    @property
    def verdict(self) -> str:
        """A short verdict: idle, saturated, fixed, or what its channel gates follow."""
        if self.change < IDLE:
            return "next to nothing"
        main = self.what or self.where
        if main is None:
            return "no gate"
        if main.saturated is not None and main.saturated > MOSTLY_SATURATED:
            return "saturated"
        if main.fixed > FIXED:
            return "the same channels for every image" if self.what else "the same for every image"
        return "follows the class" if (main.by_class or 0) > main.by_image else "follows the image"


def gate_statistics(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]]
) -> list[BlockStatistics]:
    """Run the images through `model` in eval mode and summarise its gates, block by block.

    Args:
        model: a network with attention; left unchanged.
        batches: normalised images (N, 3, H, W), all of one size, and their classes (N,) or None; or the
            signals or volumes that the model takes.

    Raises:
        ConfigError: the model has no attention, or is compiled.
        InputError: fewer than two images, images of different sizes, or not one class per image.
    """
    found: dict[str, list[_BatchGates]] = {}
    classes: list[Tensor | None] = []
    size: torch.Size | None = None
    with torch.no_grad(), eval_mode(model), record(model) as recording:
        for images, targets in batches:
            size = size or images.shape[1:]
            _check(images, targets, size)
            recording.clear()
            model(images)
            for name, block in recording.items():
                found.setdefault(name, []).append(_BatchGates.of(block))
            classes.append(None if targets is None else targets.cpu())
            if (targets is None) != (classes[0] is None):
                raise InputError("gate_statistics: classes must be given for all batches or for none")
            if not recording:
                raise ConfigError("gate_statistics: the model has no attention; add it with cbam.attach")
    if sum(len(one.change) for one in next(iter(found.values()), [])) < 2:
        raise InputError("gate_statistics: at least two images are needed to see what gates follow")
    given = [own for own in classes if own is not None]
    labels = torch.cat(given) if given else None
    return [_block_statistics(name, seen, labels) for name, seen in found.items()]


def _check(images: Tensor, targets: Tensor | None, size: torch.Size) -> None:
    if images.shape[1:] != size:  # the spatial gates are compared pixel by pixel
        raise InputError(
            f"gate_statistics: images must have one size, got {tuple(size)} and {tuple(images.shape[1:])}"
        )
    if targets is not None and targets.shape != (len(images),):
        raise InputError(
            f"gate_statistics: expected a class for each of {len(images)} images, got {tuple(targets.shape)}"
        )


@dataclass(frozen=True, eq=False)
class _BatchGates:
    """The gates of one block on one batch."""

    change: Tensor  # (N,)
    what: Tensor | None  # (N, C)
    where: Tensor | None  # (N, P), evenly spaced pixels
    channels: int
    middle: float
    bounded: bool

    @classmethod
    def of(cls, block: Refinement) -> "_BatchGates":
        before, after = block.before.flatten(1).double(), block.after.flatten(1).double()
        norm = before.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        channel, spatial = block.channel_gate, block.spatial_gate
        if channel is None and (both := block.step("both")) is not None:
            channel = both.gate.flatten(2).mean(2)
        own = next((step for step in block.steps if step.kind != "both"), None)
        return cls(
            change=((after - before).norm(dim=1) / norm).cpu(),
            what=None if channel is None else channel.flatten(1).double().cpu(),
            where=None if spatial is None else _subsample(spatial.flatten(1).double().cpu()),
            channels=block.before.shape[1],
            middle=1.0 if own is None else own.middle,
            bounded=own is not None,
        )


def _subsample(values: Tensor) -> Tensor:
    P = values.shape[1]
    return values[:, torch.linspace(0, P - 1, min(P, _SAMPLE)).long()]


def _block_statistics(name: str, seen: Sequence[_BatchGates], labels: Tensor | None) -> BlockStatistics:
    first = seen[0]
    what, where = (
        None if getattr(first, key) is None else torch.cat([getattr(one, key) for one in seen])
        for key in ("what", "where")
    )
    limit = 2 * first.middle if first.bounded else None
    return BlockStatistics(
        name=name,
        channels=first.channels,
        change=float(torch.cat([one.change for one in seen]).mean()),
        middle=first.middle,
        what=None if what is None else _statistics(what, limit, labels),
        where=None if where is None else _statistics(where, limit, None),
    )


def _statistics(values: Tensor, limit: float | None, labels: Tensor | None) -> GateStatistics:
    """The statistics of (N, C) values; `limit` is the end of the gate's range, if it has one."""
    flat = values.flatten().sort().values  # torch.quantile takes at most 16 million values
    at = [round(q * (len(flat) - 1)) for q in QUANTILES]
    saturated = None
    if limit is not None:
        ends = (values < SATURATED * limit) | (values > (1 - SATURATED) * limit)
        saturated = float(ends.double().mean())
    mean, quantiles = float(values.mean()), tuple(flat[at].tolist())
    total = float(values.var(correction=0))
    if total < 1e-12:
        return GateStatistics(mean, quantiles, saturated, 1.0, None if labels is None else 0.0)
    fixed = _fixed(values) / total
    by_class = None if labels is None else _by_class(values, labels) / total
    return GateStatistics(mean, quantiles, saturated, fixed, by_class)


def _fixed(values: Tensor) -> float:
    """The variance between channels that is the same in every image.

    The mean over N images still contains 1/N of the variance between channels within single images, which is
    subtracted.
    """
    N, C = values.shape
    mean = values.mean(0)
    rest = values - mean - values.mean(1, keepdim=True) + values.mean()
    return max(0.0, float(mean.var(correction=0)) - float(rest.square().sum()) / (N * (N - 1) * C))


def _by_class(values: Tensor, labels: Tensor) -> float:
    """The part of the remaining variance that classes explain, mean over channels, as in epsilon squared.

    With N images of K classes, chance alone explains (K - 1) / (N - 1) of the variance.
    """
    N, K = len(values), int(labels.unique().numel())
    centred = values - values.mean(0)
    total = float(centred.square().sum(0).mean())
    between = 0.0
    for label in labels.unique():
        group = centred[labels == label]
        between += len(group) * float(group.mean(0).square().mean())
    if K < 2 or N <= K:
        return 0.0
    noise = (total - between) / (N - K)
    return max(0.0, between - (K - 1) * noise) / N


def gate_table(blocks: Sequence[BlockStatistics]) -> str:
    """The statistics as a Markdown table; shares of variance in %."""
    lines = [
        "| block | channels | change, % | what, 5 to 95 % | saturated, % | fixed, % | class, % | image, % "
        "| where, 5 to 95 % | saturated, % | fixed, % | in short |",
        "|---|" + "---|" * 11,
    ]
    for block in blocks:
        cells = [block.name, str(block.channels), f"{100 * block.change:.1f}"]
        cells += [*_cells(block.what, block.middle, True), *_cells(block.where, block.middle, False)]
        cells.append(block.verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(gate: GateStatistics | None, middle: float, classes: bool) -> list[str]:
    if gate is None:
        return ["-"] * (5 if classes else 3)
    ends = gate.quantiles[0], gate.quantiles[-1]
    low, high = (drawing.factor(end, max(abs(one - middle) for one in ends)) for end in ends)
    saturated = "-" if gate.saturated is None else f"{100 * gate.saturated:.1f}"
    cells = [f"{low} to {high}", saturated, f"{100 * gate.fixed:.0f}"]
    if classes:
        by_class = "-" if gate.by_class is None else f"{100 * gate.by_class:.0f}"
        cells += [by_class, f"{100 * gate.by_image:.0f}"]
    return cells


# Inches.
_LEFT, _WIDE, _SPACE, _ROW, _HEAD, _FOOT = 0.95, 1.05, 0.16, 0.2, 0.52, 0.62
_FIXED, _CLASS, _IMAGE = "0.75", "#0072b2", "#e69f00"  # Okabe and Ito's colour-blind safe colours


def gate_figure(blocks: Sequence[BlockStatistics], path: str | Path) -> Path:
    """Draw the statistics, one row per block, and write the figure to `path`, as PNG, SVG or PDF by suffix.

    Columns: how much the block changes its map; the range of its channel gates (5 to 95 %, the middle half,
    the median) and what their variance follows; the same for its spatial gates.
    """
    path = drawing.check_format(path)
    if not blocks:
        raise InputError("gate_figure: no blocks to draw")
    return drawing.save(draw(blocks), path)


def draw(blocks: Sequence[BlockStatistics]):
    """The figure of `gate_figure` as a matplotlib object."""
    high = len(blocks) * _ROW
    page = Page(_LEFT + 5 * _WIDE + 4 * _SPACE + 0.12, _HEAD + high + _FOOT)
    titles = (
        "change of\nthe map, %", "what:\nchannel gates", "what: variance\nfollows, %",
        "where:\nspatial gates", "where: variance\nfollows, %",
    )  # fmt: skip
    panels = []
    for c, title in enumerate(titles):
        left = _LEFT + c * (_WIDE + _SPACE)
        ax = page.axes(left, _HEAD, _WIDE, high)
        page.say(left + _WIDE / 2, _HEAD - 0.06, title, va="bottom")
        ax.set_ylim(len(blocks) - 0.5, -0.5)
        ax.set_yticks([])
        ax.tick_params(labelsize=SMALL, length=2, width=0.4, pad=1.5)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        ax.spines["bottom"].set_linewidth(0.4)
        panels.append(ax)
    for r, block in enumerate(blocks):
        page.say(
            _LEFT - 0.08, _HEAD + (r + 0.5) * _ROW, drawing.truncate(block.name, _LEFT - 0.1), ha="right"
        )
        panels[0].barh(r, 100 * block.change, height=0.6, color="0.45")
        for gate, span, share in ((block.what, panels[1], panels[2]), (block.where, panels[3], panels[4])):
            if gate is not None:
                _span(span, r, gate, block.middle)
                _shares(share, r, gate)
    panels[0].set_xlim(left=0)
    middles = [block.middle for block in blocks]
    for ax in panels[1], panels[3]:
        left, right = ax.get_xlim()
        ax.set_xlim(
            min(left, *(m - drawing.MIN_REACH for m in middles)),
            max(right, *(m + drawing.MIN_REACH for m in middles)),
        )
        ax.locator_params(axis="x", nbins=3)
    for ax in panels[2], panels[4]:
        ax.set_xlim(0, 100)
        ax.set_xticks((0, 50, 100))
        ax.get_xticklabels()[-1].set_horizontalalignment("right")
    _legend(page, _HEAD + high + 0.3, middles)
    return page.figure


def _span(ax, r: int, gate: GateStatistics, middle: float) -> None:
    low, quarter, median, upper, high = gate.quantiles
    ax.plot([middle, middle], [r - 0.5, r + 0.5], color="black", linewidth=0.6, linestyle=(0, (2, 2)))
    ax.plot([low, high], [r, r], color="0.45", linewidth=1, solid_capstyle="butt")
    ax.plot([quarter, upper], [r, r], color="0.45", linewidth=5, solid_capstyle="butt")
    ax.plot([median], [r], marker="|", color="black", markersize=6, markeredgewidth=1)


def _shares(ax, r: int, gate: GateStatistics) -> None:
    left = 0.0
    for share, colour in ((gate.fixed, _FIXED), (gate.by_class or 0.0, _CLASS), (gate.by_image, _IMAGE)):
        ax.barh(r, 100 * share, left=left, height=0.6, color=colour)
        left += 100 * share


def _legend(page: Page, top: float, middles: list[float]) -> None:
    left = _LEFT
    for colour, words in (
        (_FIXED, "channel or place: the same in every image"), (_CLASS, "class"), (_IMAGE, "image"),
    ):  # fmt: skip
        ax = page.axes(left, top - 0.05, 0.1, 0.1)
        ax.set_facecolor(colour)
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(False)
        page.say(left + 0.15, top, words, ha="left")
        left += 0.35 + len(words) * drawing.CHARACTER_WIDTH
    dashed = drawing.describe_midpoint(middles).replace("\n", " ")
    words = f"bars: 5 to 95 %, the middle half, the median; dashed: {dashed}"
    page.say(_LEFT, top + 0.17, words, ha="left", size=SMALL)
