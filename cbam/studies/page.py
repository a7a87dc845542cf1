"""results.json -> report.html: one file that needs nothing else, read on a desk or on a phone."""

import base64
from html import escape

from cbam.studies.report import LABELS, facts, notes, picture_caption, table, title, verdict

COLOURS = ("#4d4d4d", "#b35806", "#2166ac", "#1b7837", "#762a83")

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { border-left: 4px solid #2166ac; padding: .2rem 0 .2rem 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; }
thead th { border-bottom: 2px solid #1a1a1a; } tr.first > * { border-top: 1px solid #ccc; }
tbody th { font-weight: 400; } tr.sub th { padding-left: 1rem; color: #595959; }
.wide { overflow-x: auto; } .wide img { display: block; width: 100%; min-width: 40rem; height: auto; }
figure { margin: 1rem 0; } figcaption, .small { font-size: .85rem; color: #595959; }
svg { width: 100%; max-width: 40rem; height: auto; }
dt { font-weight: 600; font-size: .85rem; } dd { margin: 0 0 .5rem; font-size: .85rem; }
@media (max-width: 40rem) { table { font-size: .78rem; } th, td { padding-right: .5rem; } }
"""


def page(results: dict, picture: bytes | None) -> str:
    """The whole page; `picture` is a PNG, which goes into it."""
    parts = [f"<h1>{escape(title(results))}</h1>", f'<p class="verdict">{escape(verdict(results))}</p>']
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
        inside = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f'<tr class="{kind}"><th scope="row">{escape(name.strip())}</th>{inside}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _facts(results: dict) -> str:
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in facts(results)) + "</dl>"


def _curves(results: dict) -> str:
    """Validation error over epochs: one line per arm and seed, the common start in grey."""
    lines = [("start", start["history"]) for start in results["starts"]]
    lines += [(run["arm"], run["history"]) for run in results["runs"]]
    lines = [(name, [(e["epoch"] + 1, e["val_top1"]) for e in history]) for name, history in lines if history]
    points = [point for _, line in lines for point in line]
    if len({epoch for epoch, _ in points}) < 2:
        return ""
    wide, high, left, bottom = 640, 260, 44, 36
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    top = max(y for _, y in points) or 1

    def at(x: float, y: float) -> str:
        across = left + (x - first) / (last - first) * (wide - left - 12)
        return f"{across:.1f},{8 + (1 - y / top) * (high - bottom - 8):.1f}"

    arms = [arm["name"] for arm in results["arms"]]
    colours = dict(zip(arms, COLOURS, strict=False)) | {"start": "#bdbdbd"}
    drawn = [
        f'<polyline fill="none" stroke="{colours[name]}" stroke-width="1.5" '
        f'points="{" ".join(at(*p) for p in line)}"/>'
        for name, line in lines
        if len(line) > 1
    ]
    drawn += [
        f'<circle cx="{at(*p).split(",")[0]}" cy="{at(*p).split(",")[1]}" r="2" fill="{colours[name]}"/>'
        for name, line in lines
        for p in line
    ]
    base = high - bottom
    drawn += [
        f'<path d="M{left} 8V{base}H{wide - 12}" fill="none" stroke="#1a1a1a"/>',
        f'<text x="{left - 6}" y="14" text-anchor="end">{top:.0f}</text>',
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>',
        f'<text x="{left}" y="{base + 16}">{first}</text>',
        f'<text x="{wide - 12}" y="{base + 16}" text-anchor="end">epoch {last}</text>',
    ]
    used = [name for name in ("start", *arms) if any(name == line for line, _ in lines)]
    legend = " ".join(
        f'<span style="color:{colours[name]}">&#9632;</span> '
        f"{escape(LABELS.get(name, 'plain, before the fork'))}&ensp;"
        for name in used
    )
    return (
        "<h2>Validation top-1 error, %, over epochs</h2>"
        f'<figure><svg viewBox="0 0 {wide} {high}" font-size="12" font-family="system-ui, sans-serif" '
        f'role="img" aria-label="validation error over epochs">{"".join(drawn)}</svg>'
        f"<figcaption>{legend}</figcaption></figure>"
    )
