"""Put what `benchmarks/results/` holds into docs/kernels.md: `python -m docs.fill_kernels`.

The files are those that `cbam bench --out benchmarks/results` writes. What stands between the two markers of
the page is replaced.
"""

import csv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, RESULTS, PICTURE = ROOT / "docs/kernels.md", ROOT / "benchmarks/results", "img/bandwidth.svg"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
Row = dict[str, str]


def fill(page: Path, results: Path) -> None:
    """Compute what the page shows of the results, and write it there."""
    files = [path for path in sorted(results.glob("*.csv")) if _is_bench(path)]
    measured = {path: _read(path) for path in files}
    parts = [_section(rows) for rows in measured.values()]
    if parts:
        draw(list(measured.values()), page.parent / PICTURE)
        parts.append(
            f"![How fast the traffic that cannot be saved is moved, against a copy]({PICTURE})\n\n"
            "Each point is attention alone or the end of a block at one shape: the bytes of the table above "
            "over the time, as a share of the speed at which the same machine copies a map of that size."
        )
    text = "\n\n".join(parts) or "No machine's results are in `benchmarks/results/` yet."
    before, rest = page.read_text("utf-8").split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _is_bench(path: Path) -> bool:
    with path.open(newline="") as file:
        return {"op", "implementation", "ratio", "bandwidth"} <= set(csv.DictReader(file).fieldnames or ())


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _section(rows: list[Row]) -> str:
    first = rows[0]
    kernels = "fused kernels" if first["kernels"] == "True" else "no kernels"
    title = (
        f"### {first['device']}, {first['dtype']}, torch {first['torch']}\n\n"
        f"{first['threads']} threads, {kernels}, commit `{first['commit'][:12]}`, {first['rounds']} rounds "
        "in turns. Times are ratios to the first column of their line: the median of all rounds, the least, "
        "the most."
    )
    tables = [_table([r for r in rows if r["op"] == op]) for op in ("attention", "end of a block")]
    networks = [r for r in rows if r["op"] not in ("attention", "end of a block")]
    return "\n\n".join([title, *filter(None, [*tables, _table(networks)])])


def _table(rows: list[Row]) -> str:
    """A line per case, a column per implementation."""
    if not rows:
        return ""
    arms = list(dict.fromkeys(r["implementation"] for r in rows))
    cases = list(dict.fromkeys((r["op"], r["shape"], r["layout"], r["mode"]) for r in rows))
    cells = {(r["op"], r["shape"], r["layout"], r["mode"], r["implementation"]): r for r in rows}
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
    """The share of a copy's speed over the size of the map."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cbam"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(machines), figsize=(4.6 * len(machines), 3.6), squeeze=False, sharey=True
    )
    marks = {("attention", "inference"): "o", ("attention", "training"): "s"}
    marks |= {("end of a block", "inference"): "^", ("end of a block", "training"): "D"}
    for axis, rows in zip(axes[0], machines, strict=True):
        for (op, mode), mark in marks.items():
            points = [r for r in rows if (r["op"], r["mode"]) == (op, mode) and r["bandwidth"]]
            passes = {"attention": {"inference": 4, "training": 9}}.get(op, {"inference": 5, "training": 13})
            sizes = [float(r["floor"]) / passes[mode] / 2**20 for r in points]
            axis.plot(sizes, [100 * float(r["bandwidth"]) for r in points], mark, label=f"{op}, {mode}", ms=5)
        axis.axhline(100, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.set_xlabel("size of the map, MiB")
        axis.set_title(rows[0]["device"], fontsize=10)
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("traffic, % of a copy's speed")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    fill(PAGE, RESULTS)
