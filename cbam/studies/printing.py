"""The table of a study for a reader, as Markdown and as plain text."""

import statistics
from collections.abc import Iterable
from typing import Any

from cbam.studies.report import as_markdown, by_chance
from cbam.studies.statistics import CONFIDENCE, MOST_PAIRS, POWER
from cbam.studies.study import SEEDS
from cbam.studies.tabulate import Table, commits, differences, levels, printed


def status(table: Table) -> str:
    """How much of the table is filled, and whether it counts as run."""
    whole = len(table.study.chosen(small=table.small))
    rows = f"{len(table.filled)} of {whole} rows have {SEEDS} seeds or more"
    if table.partial:
        return f"Partial: {rows}. This table does not count as run."
    return f"{rows[0].upper()}{rows[1:]}." if len(table.filled) < whole else "Complete: " + rows + "."


def outcome(table: Table) -> list[str]:
    """What the table shows in its first measure: one sentence per verdict."""
    rows = [row for row in differences(table, table.first.key) if "word" in row]
    names = [f"{_label(table, row['arm'])} against {_label(table, row['against'])}" for row in rows]
    return by_word(table.first.title, zip(names, rows, strict=True))


def by_word(measure: str, compared: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """One sentence per verdict, from the names of comparisons and their differences."""
    found: dict[str, list[str]] = {}
    for name, row in compared:
        points = f"{row['mean']:+.2f} points{_interval(row, ', {}')}"
        found.setdefault(row["word"], []).append(f"{name} ({points})")
    order = ("better", "worse", "no difference shown", "not known")
    return [
        f"{word[0].upper()}{word[1:]} in {measure}: {'; '.join(found[word])}."
        for word in order
        if word in found
    ]


def format_interval(row: dict[str, Any]) -> str:
    """A difference, followed by its interval in brackets if there is one."""
    return f"{row['mean']:+.2f}{_interval(row, ' ({})')}"


def _interval(row: dict[str, Any], form: str) -> str:
    return "" if row["low"] is None else form.format(f"{row['low']:+.2f} to {row['high']:+.2f}")


def _label(table: Table, arm: str) -> str:
    return table.study.arms[arm].label


def level_rows(table: Table) -> list[list[str]]:
    """A header, then a row per arm: cost, and each measure next to the paper's."""
    rows = [["", "parameters", "GMAC", "seeds"]]
    for measure in table.study.measures:
        rows[0] += [f"{measure.title}, %", "paper"]
    for row in levels(table):
        parameters = f"{row['parameters']:,}" if row["n"] else "-"
        gmac = "-" if row["gmac"] is None else f"{row['gmac']:.4f}"
        cells = [row["label"], parameters, gmac, str(row["n"])]
        for place, measure in enumerate(table.study.measures):
            paper = printed(row["paper"], place)
            cells += [format_level(row[measure.key]), "-" if paper is None else f"{paper:.2f}"]
        rows.append(cells)
    return rows


def difference_rows(table: Table, measure: str) -> list[list[str]]:
    """A header, then a row per comparison."""
    interval = f"{CONFIDENCE:.0%} interval".replace("%", " %")
    rows = [["", "against", "paper", "ours", interval, "verdict", "pairs", "would show", "pairs to settle"]]
    for row in differences(table, measure):
        cells = [_label(table, row["arm"]), _label(table, row["against"]), _points(row["paper"])]
        rows.append(cells + _outcome_cells(row))
    return rows


def _outcome_cells(row: dict[str, Any]) -> list[str]:
    if not row["n"]:
        return ["-", "-", "-", "0", "-", "-"]
    if row["low"] is None:
        return [_points(row["mean"]), "none", row["word"], str(row["n"]), "-", "-"]
    needed = f"over {MOST_PAIRS:,}" if row["needed"] is None else str(row["needed"])
    interval = f"{row['low']:+.2f} to {row['high']:+.2f}"
    return [_points(row["mean"]), interval, row["word"], str(row["n"]), f"{row['resolution']:.2f}", needed]


def format_level(numbers: dict[str, Any] | None) -> str:
    """A mean, and its spread if there is one."""
    if numbers is None:
        return "-"
    return f"{numbers['mean']:.2f}" + ("" if numbers["spread"] is None else f" ± {numbers['spread']:.2f}")


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def reading(table: Table) -> list[str]:
    """How to read the numbers, and what a reader must know about these."""
    count = sum(row["n"] > 1 for row in differences(table, table.first.key))
    found = [
        "± is the standard deviation over seeds. The last epoch of every run counts, never the best.",
        "Differences are in points, paired by seed: runs of one seed share the initial values of the weights "
        "they have in common, and see the same images in the same order. The interval is Student's t.",
        *([by_chance(count)] if count else []),
        f'"Would show": the smallest true difference that this many pairs detect with {100 * POWER:.0f} % '
        'power. "Pairs to settle": how many pairs would detect a difference of the size found.',
        *table.study.notes,
    ]
    found += uncounted(table) + mixed(table)
    starts = [run["start"]["sha256"] for runs in table.runs.values() for run in runs.values() if run["start"]]
    if starts:
        seeds = {s for name, runs in table.runs.items() if table.study.arms[name].forked for s in runs}
        found.append(
            f"Networks that were trained and then forked: {len(set(starts))}, from {len(seeds)} seeds."
        )
    return found


def uncounted(table: Table) -> list[str]:
    """Which runs exist but do not count."""
    found = []
    if table.failed:
        seeds = ", ".join(f"{r['arm']} seed {r['config']['seed']}" for r in table.failed)
        found.append(f"Runs that failed and do not count: {seeds}.")
    if table.changed:
        found.append(f"{table.changed} runs of modified code do not count and are left out.")
    return found


def mixed(table: Table) -> list[str]:
    """Which rows mix runs of different networks, as code of different commits may build them."""
    rows = [
        _label(table, name) for name, runs in table.runs.items() if len(set(map(_cost, runs.values()))) > 1
    ]
    return [
        f"The runs of {row} are not all of the same network: parameters, GMAC or places of attention differ "
        "between commits. Its mean is over all of them; parameters and GMAC are those of one."
        for row in rows
    ]


def _cost(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run.get(key) for key in ("parameters", "gmac", "sites"))


def facts(table: Table) -> list[tuple[str, str]]:
    """What was run, and on what, as (name, value) pairs."""
    runs = [run for row in table.runs.values() for run in row.values()]
    shared, about = table.shared, table.about
    if not runs:
        return []
    steps = f"{shared['epochs']} epochs, batch {shared['batch_size']}, {shared['optimizer']}"
    devices = {f"{r['device']['name']} ({r['device']['type']})" for r in runs}
    versions = {", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in runs}
    seconds = [run["seconds"] for run in runs]
    size = "different sizes" if about["size"] is None else f"{about['size']} px"
    reused = sum(run["study"] != table.study.name for run in runs)
    return [
        (
            "data",
            f"{about['name']}: {about['train']:,} training and {about['val']:,} validation images of "
            f"{size}, {about['classes']} classes",
        ),
        ("network", shared.get("network", "named in each row")),
        (
            "training",
            f"from scratch, {steps}, learning rate {shared['lr']:g} ({shared['schedule']}), momentum "
            f"{shared['momentum']:g}, weight decay {shared['weight_decay']:g}, {shared['precision']}"
            + _optional_settings(shared),
        ),
        ("runs", f"{len(runs)}" + (f", {reused} of them reused from other studies" if reused else "")),
        (
            "time",
            f"{sum(seconds) / 3600:.1f} hours in total, {statistics.median(seconds):.0f} s per run (median); "
            f"{sum(run['processor_seconds'] for run in runs) / 3600:.1f} hours of CPU time",
        ),
        ("devices", "; ".join(sorted(devices))),
        *_implementations(runs),
        ("versions", "; ".join(sorted(versions))),
        ("commits", ", ".join(f"{name} ({n})" for name, n in commits(runs).items())),
    ]


def _implementations(runs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What computed the attention; older records lack it."""
    words = {True: "fused kernels, where available", False: "plain torch operations"}
    names = {words[run["kernels"]] for run in runs if "kernels" in run}
    return [("attention", "; ".join(sorted(names)))] if names else []


def _optional_settings(shared: dict[str, Any]) -> str:
    """The settings that not every training has."""
    texts = (
        ("resident", ", images cropped and flipped on the device"),
        ("milestones", ", divided by 10 after epochs {}"),
        ("augment", ", augmentation {}"),
        ("regions", ", {} regions per image"),
    )
    warm = warm_up(shared)
    every = [f", {warm}"] if warm else []
    given = [(text, value) for name, text in texts if (value := shared.get(name))]
    words = [text.format(", ".join(map(str, v)) if isinstance(v, list) else v) for text, v in given]
    return "".join([*every, *words])


def warm_up(shared: dict[str, Any]) -> str:
    """The length of the warm-up in words; "" if there is none."""
    epochs = shared.get("warmup_epochs")
    return f"warm-up of {epochs:g} epoch{'' if epochs == 1 else 's'}" if epochs else ""


def title(table: Table) -> str:
    """The headline of the table."""
    return f"{table.study.title}: {table.shared.get('network', 'several networks')} on {table.shared['data']}"


def markdown(table: Table, figure: str | None) -> str:
    """The whole page; `figure` is the file name of the drawing."""
    lines = [f"# {as_markdown(title(table))}", "", f"**{as_markdown(status(table))}**", ""]
    lines += [line for sentence in outcome(table) for line in (as_markdown(sentence), "")]
    lines += _block(level_rows(table))
    for measure in table.study.measures:
        rows = difference_rows(table, measure.key)
        if len(rows) > 1:
            lines += [f"## Differences in {measure.title}", "", *_block(rows)]
        if figure and measure == table.first:
            lines += [f"![Differences in {measure.title}]({figure})", ""]
    lines += ["## How to read it", "", *(f"- {as_markdown(note)}" for note in reading(table)), ""]
    lines += ["## What was run", ""]
    lines += [f"- {as_markdown(name)}: {as_markdown(value)}" for name, value in facts(table)]
    return "\n".join(lines) + "\n"


def _block(rows: list[list[str]]) -> list[str]:
    header, *body = rows
    lines = ["| " + " | ".join(map(as_markdown, header)) + " |", "|" + " --- |" * len(header)]
    return [*lines, *("| " + " | ".join(map(as_markdown, row)) + " |" for row in body), ""]


def text(table: Table) -> str:
    """The tables as plain text."""
    lines = [title(table), status(table), *uncounted(table), *mixed(table), ""]
    for rows in (level_rows(table), difference_rows(table, table.first.key)):
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        aligned = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [aligned[0], "  ".join("-" * width for width in widths), *aligned[1:], ""]
    return "\n".join(lines)
