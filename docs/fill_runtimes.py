"""Put the times of `python -m benchmarks.runtimes` into docs/export.md: `python -m docs.fill_runtimes`.

The text between the two markers of the page is replaced.
"""

import csv
from itertools import groupby
from pathlib import Path

from docs.commits import commits
from docs.markers import between

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/export.md", ROOT / "benchmarks/results"
BEGIN, END = "<!-- runtimes:begin -->", "<!-- runtimes:end -->"
RUNTIMES = {"torch": "PyTorch", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}
CASE = ("network", "runtime", "batch", "threads")
Row = dict[str, str]


def page(text: str, results: Path = RESULTS) -> str:
    """The page `text` with a table for every machine that has results."""
    tables = "\n\n".join(section(_read(path)) for path in sorted(results.glob("runtimes-*.csv")))
    return between(text, BEGIN, END, tables or "Nothing has been measured yet.")


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def section(rows: list[Row]) -> str:
    """The table of a machine: a line per network and runtime, with the ratios to plain."""
    lines = ["| network | runtime | plain, ms | +SE | +CBAM |", "|---|---|---|---|---|"]
    for (network, runtime, *_), arms in groupby(rows, lambda row: [row[key] for key in CASE]):
        by = {row["attention"]: row for row in arms}
        cells = [f"{float(by['plain']['ms']):.1f}", _ratio(by["se"]), _ratio(by["cbam"])]
        lines.append(f"| {network} | {RUNTIMES[runtime]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _settings(rows)])


def _ratio(row: Row) -> str:
    return f"{float(row['ratio']):.2f} ({float(row['low']):.2f} to {float(row['high']):.2f})"


def _settings(rows: list[Row]) -> str:
    """Device and settings of the measurement."""
    values = {key: ", ".join(dict.fromkeys(row[key] for row in rows)) for key in rows[0]}
    versions = dict.fromkeys(f"{RUNTIMES[row['runtime']]} {row['version']}" for row in rows)
    return (
        f"{values['device']}, threads {values['threads']}, batch {values['batch']}, float32, 224 px, "
        f"{values['rounds']} rounds in alternation, load average {values['load']}; "
        f"{', '.join(versions)}; commit {commits(rows)}. Ratios to plain: median (quartiles) of the rounds."
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), encoding="utf-8")
