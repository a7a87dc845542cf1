"""The figure of a study as SVG: every difference in its first measure, with its interval."""

import math
from dataclasses import dataclass
from html import escape
from typing import Any

from cbam.studies.printing import status, title
from cbam.studies.statistics import CONFIDENCE
from cbam.studies.study import Measure
from cbam.studies.tabulate import Table, differences

WIDE, LEFT, RIGHT, ROW, TOP = 860, 320, 24, 42, 78
_BLUE, _GREY, _SEED, _PAPER, _INK, _RULE = "#2166ac", "#6b6b6b", "#a6a6a6", "#b35806", "#1a1a1a", "#d9d9d9"


def figure(table: Table) -> str | None:
    """A line per comparison: seeds as dots, the mean with its interval, the paper's difference as a diamond.

    None if there is nothing to draw.
    """
    rows = [row for row in differences(table, table.first.key) if row["n"]]
    if not rows:
        return None
    scale = _Scale.of(rows)
    high = TOP + ROW * len(rows) + 50
    parts = [_heading(table), scale.axis(TOP - 8, TOP + ROW * len(rows), table.first)]
    for index, row in enumerate(rows):
        parts.append(_line(table, row, scale, TOP + ROW * index + ROW // 2))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {high}" width="{WIDE}" height="{high}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img">\n'
        f"<title>{escape(title(table))}</title>\n"
        f'<rect width="{WIDE}" height="{high}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


@dataclass(frozen=True)
class _Scale:
    """Differences in points -> x coordinates in the drawing."""

    low: float
    high: float
    step: float

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> "_Scale":
        """Wide enough for every dot, interval and diamond, and for zero."""
        values = [0.0]
        for row in rows:
            drawn = (row["paper"], row["low"], row["high"], row["mean"], *row["each"].values())
            values += [value for value in drawn if value is not None]
        low, high = min(values), max(values)
        span = (high - low) or 1.0
        rough = span / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
        return cls(math.floor(low / step) * step, math.ceil(high / step) * step, step)

    def at(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(LEFT + share * (WIDE - LEFT - RIGHT), 1)

    def axis(self, top: float, base: float, measure: Measure) -> str:
        parts = []
        for i in range(round((self.high - self.low) / self.step) + 1):
            value = self.low + i * self.step
            zero = abs(value) < self.step / 2
            stroke = f'stroke="{_INK}"' if zero else f'stroke="{_RULE}"'
            x = self.at(0.0 if zero else value)
            parts.append(f'<path d="M{x} {top}V{base}" {stroke}/>')
            label = "0" if zero else f"{value:+.{max(0, -math.floor(math.log10(self.step)))}f}"
            parts.append(f'<text x="{x}" y="{base + 18}" text-anchor="middle" fill="{_INK}">{label}</text>')
        middle = (LEFT + WIDE - RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{base + 38}" text-anchor="middle" fill="{_INK}">'
            f"difference in {measure.title}, points ({measure.better} of zero is better)</text>"
        )
        return "\n".join(parts)


def _heading(table: Table) -> str:
    legend = (
        f"dots: seeds; bar: mean with {CONFIDENCE:.0%} interval, ".replace("%", " %")
        + f"blue where it excludes zero; diamond: the paper's difference ({table.study.paper_data})"
    )
    name = title(table)
    size = round(min(15, 15 * 90 / len(name)), 1)  # 90 bold letters of 15 px fill the width
    return (
        f'<text x="12" y="22" font-size="{size:g}" font-weight="600" fill="{_INK}">{escape(name)}</text>\n'
        f'<text x="12" y="41" fill="{_GREY}">{escape(status(table))}</text>\n'
        f'<text x="12" y="59" fill="{_GREY}">{escape(legend)}</text>'
    )


def _line(table: Table, row: dict[str, Any], scale: _Scale, y: float) -> str:
    arms = table.study.arms
    colour = _BLUE if row["word"] in ("better", "worse") else _GREY
    parts = [
        f'<text x="{LEFT - 12}" y="{y - 2}" text-anchor="end" fill="{_INK}">'
        f"{escape(arms[row['arm']].label)}</text>",
        f'<text x="{LEFT - 12}" y="{y + 13}" text-anchor="end" font-size="11" fill="{_GREY}">'
        f"against {escape(arms[row['against']].label)}</text>",
    ]
    parts += [
        f'<circle cx="{scale.at(value)}" cy="{y + 9}" r="2.5" fill="{_SEED}"/>'
        for value in row["each"].values()
    ]
    if row["low"] is not None:
        low, high = scale.at(row["low"]), scale.at(row["high"])
        parts.append(f'<path d="M{low} {y}H{high}" stroke="{colour}" stroke-width="3"/>')
    x = scale.at(row["mean"])
    parts.append(f'<path d="M{x} {y - 6}V{y + 6}" stroke="{colour}" stroke-width="3"/>')
    if row["paper"] is not None:
        x = scale.at(row["paper"])
        parts.append(
            f'<path d="M{x} {y - 6}l6 6l-6 6l-6 -6z" fill="none" stroke="{_PAPER}" stroke-width="1.5"/>'
        )
    return "\n".join(parts)
