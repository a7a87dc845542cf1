"""Put the results in `benchmarks/results/` into docs/kernels.md and README.md: `python -m docs.fill_kernels`.

The files are written by `cbam bench --out benchmarks/results` and `benchmarks/gpu.sh`; quick runs and rows
that failed the gate are left out. The text between the two markers of each page is replaced: docs/kernels.md
gets everything, the README one network on every machine.
"""

import csv
import math
from pathlib import Path

from docs.commits import commits
from docs.markers import between

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs/kernels.md", ROOT / "README.md"
RESULTS, PICTURE = ROOT / "benchmarks/results", "img/bandwidth.svg"
SHOWN = "resnet50"  # in the README
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
LINES = {  # (operation, mode) -> colour, mark; distinguishable with colour blindness
    ("attention", "inference"): ("#0072B2", "o"),
    ("attention", "training"): ("#56B4E9", "s"),
    ("end of a block", "inference"): ("#D55E00", "^"),
    ("end of a block", "training"): ("#E69F00", "D"),
}
MACHINE = ("device", "dtype", "torch", "threads", "kernels")
BENCH = {"op", "implementation", "ratio", "bandwidth"}
Row = dict[str, str]


def fill(page: Path, results: Path) -> None:
    """Write the results into the page, and draw its figure."""
    measured = machines(results)
    parts = [_section(rows) for rows in measured]
    drawn = [rows for rows in measured if any(row["bandwidth"] for row in rows)]
    if drawn:
        draw(drawn, page.parent / PICTURE)
        parts.append(
            f"![Speed of the unavoidable memory traffic, against a copy]({PICTURE})\n\n"
            "Each point is attention alone or the end of a block at one shape: the bytes of the traffic "
            "table over the time, relative to the speed at which the same machine copies a map of that size. "
            "Filled marks are NCHW, open ones channels_last."
        )
    _put(page, parts)


def fill_readme(readme: Path, results: Path) -> None:
    """Write the cost for one network on every machine, without kept memory, into the README."""
    parts = []
    for rows in machines(results):
        own = [row for row in rows if row["op"] == SHOWN]
        if own and rows[0].get("memory") != "kept":
            first = own[0]
            where = f"{first['device']}, {first['threads']} threads, {first['dtype']}, torch {first['torch']}"
            parts.append(
                f"{_table(own)}\n\n{where}. Times as ratios to the plain network: median [minimum, maximum] "
                f"of {_rounds(own)} in alternation."
            )
    _put(readme, parts)


def _put(page: Path, parts: list[str]) -> None:
    text = "\n\n".join(parts) or "No machine's results are in `benchmarks/results/` yet."
    page.write_text(between(page.read_text("utf-8"), BEGIN, END, text), encoding="utf-8")


def machines(results: Path) -> list[list[Row]]:
    """The rows of every machine from all of its files; for a case in several files, the first counts."""
    found: dict[tuple, list[Row]] = {}
    taken: dict[tuple, Path] = {}
    for path in sorted(results.glob("*.csv"), key=_order):
        for row in _read(path):
            machine = *(row[name] for name in MACHINE), row.get("memory") == "kept"
            if taken.setdefault((machine, _case(row)), path) == path:
                found.setdefault(machine, []).append(row)
    return list(found.values())


def _order(path: Path) -> tuple[bool, str]:
    """Sort key: default before kept memory, by name; compiled networks last, as they repeat eager cases."""
    return path.stem.startswith("compiled-"), path.stem


def _read(path: Path) -> list[Row]:
    """The rows that may be shown; none from files of other kinds."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if path.stem.endswith("-quick") or not (rows and rows[0].keys() >= BENCH):
        return []
    return [row for row in rows if row.get("gate", "passed") == "passed"]


def _case(row: Row) -> tuple[str, ...]:
    return row["op"], row["shape"], row["layout"], row["mode"]


def _rounds(rows: list[Row]) -> str:
    return " or ".join(map(str, sorted({int(row["rounds"]) for row in rows}))) + " rounds"


def _section(rows: list[Row]) -> str:
    first = rows[0]
    kernels = "fused kernels" if first["kernels"] == "True" else "no kernels"
    kept = ", freed memory kept" if first.get("memory") == "kept" else ""
    title = (
        f"### {first['device']}, {first['dtype']}, torch {first['torch']}{kept}\n\n"
        f"{first['threads']} threads, {kernels}, commit {commits(rows)}, {_rounds(rows)} "
        "in alternation. Times are ratios to the first column: median [minimum, maximum] of the rounds."
    )
    tables = [_table([r for r in rows if r["op"] == op]) for op in ("attention", "end of a block")]
    networks = [r for r in rows if r["op"] not in ("attention", "end of a block")]
    return "\n\n".join([title, *filter(None, [*tables, _table(networks)])])


def _table(rows: list[Row]) -> str:
    """A line per case, a column per implementation."""
    if not rows:
        return ""
    arms = list(dict.fromkeys(r["implementation"] for r in rows))
    cases = list(dict.fromkeys(map(_case, rows)))
    cells = {(*_case(r), r["implementation"]): r for r in rows}
    lines = [f"| {' | '.join(['what', *arms])} |", "|" + "---|" * (1 + len(arms))]
    for case in cases:
        shown = [_cell(cells.get((*case, arm)), arm == rows[0]["implementation"]) for arm in arms]
        lines.append(f"| {' '.join(case)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(row: Row | None, first: bool) -> str:
    if row is None:
        return ""
    if first:
        return f"{float(row['ms']):.4g} ms"
    return f"{float(row['ratio']):.2f} [{float(row['low']):.2f}, {float(row['high']):.2f}]"


def draw(machines: list[list[Row]], path: Path) -> None:
    """Plot speed relative to a copy against map size: a line per operation, a panel per machine."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cbam"
    from matplotlib import pyplot as plt

    across = min(2, len(machines))  # so that the text is legible on a page
    down = math.ceil(len(machines) / across)
    size = 0.9 + 3.9 * across, 0.5 + 3 * down
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, sharey=True)
    for axis in axes.flat[len(machines) :]:
        axis.remove()
    for axis, rows in zip(axes.flat, machines, strict=False):
        _panel(axis, [row for row in rows if row["bandwidth"]])
        kept = ", memory kept" if rows[0].get("memory") == "kept" else ""
        axis.set_title(f"{rows[0]['device']}, {rows[0]['dtype']}{kept}", fontsize=10)
    shares = [100 * float(row["bandwidth"]) for rows in machines for row in rows if row["bandwidth"]]
    axes[0][0].set_ylim(0, 1.05 * max(105, *shares))
    for axis in axes[:, 0]:
        axis.set_ylabel("traffic, % of a copy's speed")
    lines, words = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, words, loc="lower center", ncol=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.45 / size[1], 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _panel(axis, rows: list[Row]) -> None:
    """One machine: filled marks are NCHW, open ones channels_last."""
    sizes = {row["shape"]: _megabytes(row["shape"], row["dtype"]) for row in rows}
    for (op, mode), (colour, mark) in LINES.items():
        for layout, how in (("NCHW", {}), ("NHWC", {"markerfacecolor": "white", "linestyle": ":"})):
            own = [r for r in rows if (r["op"], r["mode"], r["layout"]) == (op, mode, layout)]
            points = sorted((sizes[r["shape"]], 100 * float(r["bandwidth"])) for r in own)
            label = f"{op}, {mode}" if layout == "NCHW" else None
            style = {"marker": mark, "color": colour, "markersize": 5, "linewidth": 1.2, **how}
            axis.plot(*zip(*points, strict=True), label=label, **style) if points else None
    axis.axhline(100, color="black", linewidth=0.8)
    axis.text(0.02, 102, "a copy", transform=axis.get_yaxis_transform(), fontsize=8)
    axis.set_xscale("log")
    axis.set_xticks(list(sizes.values()), [f"{size:.3g}" for size in sizes.values()])
    axis.minorticks_off()
    axis.grid(axis="y", linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.set_xlabel("size of the map, MiB")


def _megabytes(shape: str, dtype: str) -> float:
    """Size in MiB of a map of a shape like "8x256x56x56"."""
    return math.prod(map(int, shape.split("x"))) * BYTES[dtype] / 2**20


if __name__ == "__main__":
    fill(PAGE, RESULTS)
    fill_readme(README, RESULTS)
