"""The paper's figure: images and each network's map of the evidence, as rows or a contact sheet."""

import math
from collections.abc import Sequence
from pathlib import Path

from cbam.errors import InputError
from cbam.explain import page as drawing
from cbam.explain.looking import Glance, Look
from cbam.explain.maps import METHODS
from cbam.explain.page import SMALL, Page

# Inches. One block with two networks is as wide as one column of a page, two blocks as the whole page.
_BLOCK, _LEFT, _GAP, _BETWEEN = 3.45, 0.22, 0.05, 0.1
_HEAD, _LINE, _FOOT = 0.36, 0.14, 0.40


def look_figure(looks: Sequence[Look], path: str | Path, *, across: int = 1) -> Path:
    """Draw one row per image and write the figure to `path`, as PNG, SVG or PDF by suffix; returns the path.

    Columns: the image and the class, then each network's map of the evidence for it, with its probability,
    and the network's prediction if it is another class.

    Args:
        looks: from `look`, all with the same networks.
        path: the output file; replaced atomically.
        across: number of blocks in which rows are drawn side by side; 2 for a contact sheet.

    Raises:
        ConfigError: the suffix is not .png, .svg or .pdf.
        InputError: nothing to draw, or different networks.
        MissingExtraError: matplotlib is not installed. OutputError: the figure cannot be written.
    """
    path = drawing.check_format(path)
    return drawing.save(draw(looks, across), path)


def draw(looks: Sequence[Look], across: int = 1, *, opacity: float = drawing.OPACITY, threshold: float = 0.0):
    """The figure of `look_figure` as a matplotlib object; `opacity` and `threshold` as in `page.blend`."""
    if not looks:
        raise InputError("look_figure: no image to draw")
    names = [glance.network for glance in looks[0].glances]
    if any([glance.network for glance in look.glances] != names for look in looks):
        raise InputError("look_figure: the images were processed by different networks")
    return _Sheet(looks, names, across, {"opacity": opacity, "threshold": threshold}).figure


class _Sheet(Page):
    def __init__(self, looks: Sequence[Look], names: list[str], across: int, style: dict[str, float]) -> None:
        self.style = style  # arguments of `show_heat`
        across = min(across, len(looks))
        columns = 1 + len(names)
        self.side = (_BLOCK - _LEFT - 2 * _GAP) / 3  # fits the captions; more networks make the block wider
        self.block = _LEFT + columns * self.side + (columns - 1) * _GAP
        rows = math.ceil(len(looks) / across)
        lines = max(len(words) for look in looks for words in self._captions(look))
        self.pitch = self.side + 0.1 + lines * _LINE
        width = across * (self.block + _BETWEEN) - _BETWEEN + 0.05
        super().__init__(width, _HEAD + rows * self.pitch + _FOOT)
        for b in range(across):
            self._head(b, names, METHODS[looks[0].method])
        for i, look in enumerate(looks):
            self._row(i % across, _HEAD + i // across * self.pitch, look)
        disagree = any(glance.best_index != look.index for look in looks for glance in look.glances)
        self._foot(names, _HEAD + rows * self.pitch, disagree)

    def _left(self, block: int, column: int = 0) -> float:
        return block * (self.block + _BETWEEN) + _LEFT + column * (self.side + _GAP)

    def _head(self, block: int, names: list[str], method: str) -> None:
        for c, title in enumerate(["input", *(f"{method}\n{drawing.truncate(n, self.side)}" for n in names)]):
            self.say(self._left(block, c) + self.side / 2, _HEAD - 0.05, title, va="bottom")

    def _row(self, block: int, top: float, look: Look) -> None:
        middle = top + self.side / 2
        self.say(
            self._left(block) - 0.11,
            middle,
            drawing.truncate_middle(look.name, self.side),
            size=SMALL,
            turn=90,
        )
        for c, words in enumerate(self._captions(look)):
            ax = self.axes(self._left(block, c), top, self.side, self.side)
            if c == 0:
                drawing.show(ax, look.image)
            else:
                drawing.show_heat(ax, look.image, look.glances[c - 1].heat, **self.style)
            drawing.remove_ticks(ax)
            for line, text in enumerate(words):
                x, y = self._left(block, c) + self.side / 2, top + self.side + 0.115 + line * _LINE
                self.say(x, y, text, va="baseline")

    def _captions(self, look: Look) -> list[list[str]]:
        """The lines under each cell of a row."""
        target = drawing.wrap(look.target, self.side).split("\n")
        return [target, *(self._caption(look, glance) for glance in look.glances)]

    def _caption(self, look: Look, glance: Glance) -> list[str]:
        own = f"p = {glance.probability:.2f}{'' if glance.heat.any() else ', empty map'}"
        if glance.best_index == look.index:
            return [own]
        return [own, drawing.truncate(f"{glance.best_probability:.2f} {glance.best}", self.side)]

    def _foot(self, names: list[str], top: float, disagree: bool) -> None:
        wide = len(names) * (self.side + _GAP) - _GAP
        ax = self.axes(self._left(0, 1), top + 0.04, wide, 0.06)
        of = "the class on the left" if len(names) > 1 else "the class"  # short enough for one cell
        least = f", from {self.style['threshold']:.2g} on" if self.style["threshold"] else ""
        self.bar(ax, drawing.HEAT, drawing.EVIDENCE, f"evidence for {of}{least}")
        note = "p: of that class" + ("\nbelow: its prediction" if disagree else "")
        self.say(self._left(0) + self.side / 2, top + 0.14, note, size=SMALL - 0.5)
