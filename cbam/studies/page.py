"""results.json -> report.html: one self-contained file, for large and small screens."""

import base64
from dataclasses import dataclass
from html import escape
from statistics import fmean

from cbam.studies.report import LABELS, facts, notes, picture_caption, table, title, verdict

COLOURS = ("#4d4d4d", "#b35806", "#2166ac", "#1b7837", "#762a83")
WIDE, HIGH, LEFT, BOTTOM = 480, 240, 36, 28  # of the plot of errors over epochs

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { border-left: 4px solid #2166ac; padding-left: 1rem; } .verdict p { margin: .5rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; }
thead th { border-bottom: 2px solid #1a1a1a; } tr.first > * { border-top: 1px solid #ccc; }
tbody th { font-weight: 400; } tr.sub th { padding-left: 1rem; color: #595959; }
.wide { overflow-x: auto; } .wide img { display: block; width: 100%; min-width: 40rem; height: auto; }
figure { margin: 1rem 0; } figcaption, .small { font-size: .85rem; color: #595959; }
svg { width: 100%; max-width: 30rem; height: auto; }
dt { font-weight: 600; font-size: .85rem; } dd { margin: 0 0 .5rem; font-size: .85rem; }
@media (max-width: 40rem) { table { font-size: .78rem; } th, td { padding-right: .5rem; } }
"""


def page(results: dict, picture: bytes | None) -> str:
    """The whole page; `picture` is a PNG, which is embedded."""
    parts = [f"<h1>{escape(title(results))}</h1>", '<div class="verdict">']
    parts += [f"<p>{escape(sentence)}</p>" for sentence in verdict(results)] + ["</div>"]
    parts += ['<div class="wide">' + _table(results) + "</div>"]
    parts += ['<ul class="small">' + "".join(f"<li>{escape(note)}</li>" for note in notes(results)) + "</ul>"]
    if picture:
        data = base64.b64encode(picture).decode()
        parts += [
            "<h2>What the networks look at</h2>",
            '<figure><div class="wide"><img alt="Grad-CAM and feature maps" '
            f'src="data:image/png;base64,{data}"></div>'
            f"<figcaption>{escape(picture_caption(results))}</figcaption></figure>",
        ]
    parts += [_curves(results), "<h2>What was run</h2>", _facts(results)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title(results))}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(results: dict) -> str:
    header, *rows = table(results)
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = []
    for name, *cells in rows:
        kind = "sub" if name.startswith(" ") else "first"
        inside = "".join(f"<td>{escape(cell).replace(' ± ', '&nbsp;±&nbsp;')}</td>" for cell in cells)
        body.append(f'<tr class="{kind}"><th scope="row">{escape(name.strip())}</th>{inside}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _facts(results: dict) -> str:
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in facts(results)) + "</dl>"


def _curves(results: dict) -> str:
    """Validation error over epochs: a thin line per run, a thick one for the mean over seeds."""
    runs = [("start", start["history"]) for start in results["starts"]]
    runs += [(run["arm"], run["history"]) for run in results["runs"]]
    lines: dict[str, list[dict[int, float]]] = {}
    for name, history in runs:
        lines.setdefault(name, []).append({entry["epoch"] + 1: entry["val_top1"] for entry in history})
    epochs = sorted({epoch for arm in lines.values() for line in arm for epoch in line})
    if len(epochs) < 2:
        return ""
    top = max(error for arm in lines.values() for line in arm for error in line.values()) or 1.0
    scale = _Scale(epochs[0], epochs[-1], top)
    arms = [arm["name"] for arm in results["arms"]]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(arms)} | {"start": "#b0b0b0"}
    names = [name for name in ("start", *arms) if name in lines]
    drawn = []
    for name in names:
        drawn += [scale.line(line, colours[name], 'stroke-width="1" opacity=".4"') for line in lines[name]]
    for name in names:
        common = set.intersection(*(set(line) for line in lines[name]))
        mean = {epoch: fmean(line[epoch] for line in lines[name]) for epoch in sorted(common)}
        drawn.append(scale.line(mean, colours[name], 'stroke-width="2.5"'))
    legend = " ".join(
        f'<span style="color:{colours[name]}">&#9632;</span> '
        f"{escape(LABELS.get(name, 'plain, before the fork'))}&ensp;"
        for name in names
    )
    return (
        "<h2>Validation top-1 error, %, over epochs</h2>"
        f'<figure><svg viewBox="0 0 {WIDE} {HIGH}" font-size="13" font-family="system-ui, sans-serif" '
        f'role="img" aria-label="validation error over epochs">{"".join(drawn)}{scale.axes()}</svg>'
        f"<figcaption>{legend}<br>thin: one seed; thick: mean over seeds</figcaption></figure>"
    )


@dataclass(frozen=True)
class _Scale:
    """Epochs and errors -> coordinates in the plot."""

    first: int
    last: int
    top: float

    def at(self, epoch: float, error: float) -> tuple[float, float]:
        x = LEFT + (epoch - self.first) / (self.last - self.first) * (WIDE - LEFT - 10)
        return round(x, 1), round(8 + (1 - error / self.top) * (HIGH - BOTTOM - 8), 1)

    def line(self, points: dict[int, float], colour: str, style: str) -> str:
        places = [self.at(epoch, error) for epoch, error in points.items()]
        if len(places) == 1:  # a single epoch is drawn as a dot
            return f'<circle cx="{places[0][0]}" cy="{places[0][1]}" r="3" fill="{colour}" {style}/>'
        joined = " ".join(f"{x},{y}" for x, y in places)
        return f'<polyline fill="none" stroke="{colour}" {style} points="{joined}"/>'

    def axes(self) -> str:
        base = HIGH - BOTTOM
        found = [f'<path d="M{LEFT} 8V{base}H{WIDE - 10}" fill="none" stroke="#1a1a1a"/>']
        for error in (0, self.top / 2, self.top):
            y = self.at(self.first, error)[1]
            found.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{error:.0f}</text>')
        found.append(f'<text x="{LEFT}" y="{base + 18}">{self.first}</text>')
        found.append(f'<text x="{WIDE - 10}" y="{base + 18}" text-anchor="end">epoch {self.last}</text>')
        return "".join(found)
