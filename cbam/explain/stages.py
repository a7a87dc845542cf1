"""What and where, stage by stage: the gates of one network on one image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cbam.errors import InputError
from cbam.explain import page as drawing
from cbam.explain.looking import Look, stages
from cbam.explain.page import SMALL, TEXT, Page
from cbam.explain.recording import Refinement

CAPTION_LENGTH = 16  # characters that fit under a channel in normal size
TOP = 3  # channels shown, of those raised most and of those lowered most

# Inches.
_LEFT, _CELL, _GAP, _HISTOGRAM = 0.62, 0.82, 0.05, 1.15
_HEAD, _PITCH, _FOOT = 0.42, 1.05, 0.40


def stages_figure(look: Look, path: str | Path, *, network: str | None = None) -> Path:
    """Draw the gates of `network`, one row for the last block with attention of each map shape.

    Columns: where, the spatial gate over the image, white at the midpoint and on one colour scale for all
    rows; what, a histogram of the channel gates; the channels that the block raises most and lowers most, as
    they enter the gate. Columns for gates that no block has are left out.

    Args:
        look: from `look`.
        path: the output file, .png, .svg or .pdf; replaced atomically.
        network: the network whose gates are drawn; by default the last one with gates.

    Raises:
        InputError: the network has no gates: no attention, or one that adds instead of multiplying.
        ConfigError, MissingExtraError, OutputError: as in `look_figure`.
    """
    path = drawing.check_format(path)
    return drawing.save(draw(look, network), path)


def draw(look: Look, network: str | None = None):
    """The figure of `stages_figure` as a matplotlib object."""
    network = next(reversed(look.blocks), None) if network is None else network
    if network not in look.blocks:
        raise InputError(f"{look.name!r}: no gates to show of {network or 'any network'}")
    shown = stages(look.blocks[network])
    return _Stages(look, network, shown).figure


def over_picture(image: Tensor, gate: Tensor, scale: tuple[float, float], opacity: float = 0.65):
    """Blend a gate (h, w) in colour over its greyscale image: float array (H, W, 3) in [0, 1].

    Args:
        scale: the gate's value at the centre of the colour map, and its reach to either side.
        opacity: of the colour.
    """
    middle, reach = scale
    shade = ((gate.float() - middle) / (2 * reach) + 0.5).clamp(0, 1)
    large = torch.nn.functional.interpolate(shade[None, None], image.shape[-2:], mode="nearest")[0, 0]
    return drawing.blend(image, large, drawing.GATE, opacity=opacity)


@dataclass(frozen=True)
class Channel:
    """One channel of a block.

    Attributes:
        map: (h, w), before the block's attention.
        reach: the largest distance of the block's gates from their midpoint.
    """

    index: int
    gate: float
    map: Tensor
    reach: float


def channel_gates(block: Refinement) -> tuple[Tensor, float, float] | None:
    """The gates of a block's channels, (C,), their midpoint, and their largest distance from it."""
    step = block.step("what") or block.step("both")
    if step is None:
        return None
    gates = step.gate[0].float().mean((1, 2))
    return gates, step.middle, drawing.gate_reach([(gates, step.middle)])


def top_channels(block: Refinement, count: int = TOP) -> tuple[list[Channel], list[Channel]]:
    """The channels with the largest gates and those with the smallest, each starting at the extreme."""
    if (found := channel_gates(block)) is None:
        return [], []
    gates, _, reach = found
    order = gates.argsort().tolist()
    count = min(count, len(order) // 2)
    named = [Channel(i, float(gates[i]), block.before[0, i].float().abs(), reach) for i in order]
    return named[::-1][:count], named[:count]


def where_middle(block: Refinement) -> float:
    """The midpoint of a block's spatial gate."""
    step = block.step("where") or block.step("both")
    return 1.0 if step is None else step.middle


def where_reach(blocks: Sequence[Refinement]) -> float:
    """The largest distance of these blocks' spatial gates from their midpoint: one scale for all."""
    gated = [(gate[0], block) for block in blocks if (gate := block.spatial_gate) is not None]
    return drawing.gate_reach((gate, where_middle(block)) for gate, block in gated)


class _Stages(Page):
    def __init__(self, look: Look, network: str, blocks: dict[str, Refinement]) -> None:
        self.look, self.blocks = look, blocks
        self.reach = where_reach(list(blocks.values()))
        gated = [block for block in blocks.values() if block.spatial_gate is not None]
        self.whites = sorted({where_middle(block) for block in gated})
        whats = [step for block in blocks.values() if (step := block.step("what") or block.step("both"))]
        self.middles = [step.middle for step in whats]
        self.where = self.what = self.channels = None  # left edges of the columns that are drawn
        right = _LEFT
        if gated:
            self.where, right = right, right + _CELL + _GAP
        if whats:
            self.what, self.channels = right + 0.09, right + _HISTOGRAM + 0.2
            right = self.channels + 2 * TOP * (_CELL + _GAP)
        super().__init__(right - _GAP + 0.06, _HEAD + len(blocks) * _PITCH + _FOOT)
        self._head(f"{drawing.truncate_middle(look.name, 0.56)}\n{drawing.truncate(network, 0.56)}")
        for r, (name, block) in enumerate(blocks.items()):
            self._row(name, block, _HEAD + r * _PITCH)
        self._foot(_HEAD + len(blocks) * _PITCH)

    def _head(self, about: str) -> None:
        top = _HEAD - 0.06
        self.say(0.06, top, about, ha="left", va="bottom", size=SMALL)
        if self.where is not None:
            self.say(self.where + _CELL / 2, top, "where:\nspatial gate", va="bottom")
        if self.what is None:
            return
        title = "what: channel gates,\nhistogram"
        self.say(self.what + _HISTOGRAM / 2, top, title, va="bottom")
        tops = [top_channels(block) for block in self.blocks.values()]
        raised, lowered = ([channel.gate for own in tops for channel in own[side]] for side in (0, 1))
        wide = TOP * (_CELL + _GAP) - _GAP
        for side, words in enumerate(drawing.describe_channels(raised, lowered)):
            break_ = "\n" if "gates" in words else " "  # these are too long for one line
            title = f"channels {words},{break_}before gating"
            self.say(self._column(side * TOP) + wide / 2, top, title, va="bottom")

    def _column(self, c: int) -> float:
        """Left edge of the column of the c-th channel."""
        return (self.channels or 0) + c * (_CELL + _GAP)

    def _row(self, name: str, block: Refinement, top: float) -> None:
        C, h, w = block.before.shape[1:]
        words = f"{drawing.truncate(name, 0.56)}\n{C} ch.\n{h} × {w}"
        if len(self.whites) > 1 and block.spatial_gate is not None:
            words += f"\nwhite: {where_middle(block):.2g}"
        self.say(0.06, top + _CELL / 2, words, ha="left", size=SMALL)
        self._where(block, top)
        self._what(block, top)
        raised, lowered = top_channels(block)
        for c, channel in enumerate([*raised, *[None] * (TOP - len(raised)), *lowered]):
            if channel is not None:
                self._channel(channel, self._column(c), top)

    def _where(self, block: Refinement, top: float) -> None:
        gate = block.spatial_gate
        if gate is None or self.where is None:
            return
        ax, scale = self.axes(self.where, top, _CELL, _CELL), (where_middle(block), self.reach)
        ax.imshow(over_picture(self.look.image, gate[0, 0], scale), interpolation="nearest")
        drawing.remove_ticks(ax)
        low, high = (drawing.factor(float(end), self.reach) for end in gate.aminmax())
        drawing.add_caption(ax, f"{low} to {high}")

    def _what(self, block: Refinement, top: float) -> None:
        if (found := channel_gates(block)) is None or self.what is None:
            return
        gates, middle, reach = found
        ax = self.axes(self.what, top, _HISTOGRAM, _CELL)
        ax.hist(gates.numpy(), bins=25, range=(middle - reach, middle + reach), color="0.45")
        ax.axvline(middle, color="black", linewidth=0.6, linestyle=(0, (2, 2)))
        ax.set_xlim(middle - reach, middle + reach)
        ticks = (middle - reach, middle, middle + reach)
        ax.set_xticks(ticks, labels=[drawing.factor(tick, reach) for tick in ticks])
        for label, side in zip(ax.get_xticklabels(), ("left", "center", "right"), strict=True):
            label.set_horizontalalignment(side)
        ax.set_yticks([])
        ax.tick_params(labelsize=TEXT, length=2, width=0.4, pad=1.5)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        ax.spines["bottom"].set_linewidth(0.4)

    def _channel(self, channel: Channel, left: float, top: float) -> None:
        ax = self.axes(left, top, _CELL, _CELL)
        size = self.look.image.shape[-2], self.look.image.shape[-1]
        drawing.cells(ax, size, channel.map, drawing.STRENGTH, 0, float(channel.map.max()) or 1)
        drawing.remove_ticks(ax)
        words = f"no. {channel.index}: × {drawing.factor(channel.gate, channel.reach)}"
        drawing.add_caption(ax, words, drawing.SMALL if len(words) > CAPTION_LENGTH else drawing.TEXT)

    def _foot(self, top: float) -> None:
        if self.where is not None:
            self._scale(self.axes(self.where, top, _CELL, 0.06))
        if self.what is not None:
            wide = 2 * TOP * (_CELL + _GAP) - _GAP
            self.bar(
                self.axes(self._column(0), top, wide, 0.06), drawing.STRENGTH,
                {0: "0", 1: "largest of the map"}, "|activation|",
            )  # fmt: skip
            words = f"dashed: {drawing.describe_midpoint(self.middles)}"
            self.say(self.what + _HISTOGRAM / 2, top + 0.1, words, size=SMALL)

    def _scale(self, ax) -> None:
        """The colour bar of the spatial gates: factors, or their distance from white if midpoints differ."""
        if len(self.whites) == 1:
            values, title = [self.whites[0] + step * self.reach for step in (-1, 0, 1)], "factor"
        else:
            values, title = [-self.reach, 0, self.reach], "factor, from white"
        self.bar(ax, drawing.GATE, {value: drawing.factor(value, self.reach) for value in values}, title)
