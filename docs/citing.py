"""What README.md says of the studies on photographs: one table with the rows of all tables that count.

A column is one training. What stands in several studies stands here once; a row with too few seeds stands in
its table alone.
"""

import json
from typing import Any

from cbam.studies.printing import by_word, level_rows, warm_up
from cbam.studies.report import LABELS, as_markdown, by_chance
from cbam.studies.study import SEEDS
from cbam.studies.tabulate import Table, differences

COLD = """\
The other columns are without a warm-up. At a rate of 0.1 the plain network needs one; without it, it falls
behind by the luck of the seed, while the paper's start damps every block at first. They show:"""


def cited(judged: list[Table]) -> str:
    """What tables show, those of a network and a data set together."""
    about = [(table.shared.get("network"), table.shared["data"]) for table in judged]
    groups = [
        [table for table, own in zip(judged, about, strict=True) if own == one]
        for one in dict.fromkeys(about)
    ]
    return "\n\n".join(_together(sorted(group, key=_closeness, reverse=True)) for group in groups)


def parts(table: Table) -> list[str]:
    """How a table was trained, part by part."""
    shared = table.shared
    size = shared["size"] or table.about["size"]
    return [
        f"{table.about['train']} pictures" + (f" of {size} px" if size else ""),
        f"{shared['epochs']} epochs",
        f"batch {shared['batch_size']}",
        shared["precision"],
        f"rate {shared['lr']:g}",
        warm_up(shared) or "no warm-up",
    ]


def _closeness(table: Table) -> tuple[bool, bool]:
    """How near a table is to the protocol: what is nearest is the comparison to go by."""
    return table.usual, bool(table.shared.get("warmup_epochs"))


def _together(tables: list[Table]) -> str:
    columns: dict[str, list[Table]] = {}
    for table in tables:
        columns.setdefault(", ".join(parts(table)), []).append(table)
    first = tables[0]
    common = [part for part in parts(first) if all(part in parts(table) for table in tables)]
    heads = [", ".join(p for p in parts(own[0]) if p not in common) for own in columns.values()]
    labels = _labels(tables)
    seeds, rows = _rows(list(columns.values()), labels)
    network = first.shared.get("network", "several networks")
    about = f"{network} on {first.shared['data']}"
    lines = [f"**{as_markdown(about)}**: {', '.join(common)}; {first.first.title} in %, {seeds}.", ""]
    lines += [f"| | {' | '.join(head or first.first.title for head in heads)} |"]
    lines += ["|---|" + "---|" * len(columns), *rows, ""]
    told = [_differences(own, labels) for own in columns.values()]
    lines += ["The first column is the comparison to go by:" if len(columns) > 1 else "It shows:", ""]
    lines += [f"- {as_markdown(sentence)}" for sentence in by_word(first.first.title, told[0])]
    if len(columns) > 1:
        warm = [bool(own[0].shared.get("warmup_epochs")) for own in columns.values()]
        lines += ["", COLD if warm[0] and not any(warm[1:]) else "The other columns show:", ""]
        for head, rest in zip(heads[1:], told[1:], strict=True):
            lines.append(f"- {head}: {as_markdown(_shown(by_word(first.first.title, rest)))}")
    return "\n".join([*lines, "", by_chance(sum(map(len, told)), " here"), "", _links(tables)])


def _labels(tables: list[Table]) -> dict[str, str]:
    """A name for every kind of run, by its key; how attention begins is said where that differs."""
    found: dict[str, tuple[Table, str]] = {}
    starts: dict[tuple, set[str]] = {}
    for table in tables:
        for name in _rows_that_count(table):
            found.setdefault(_key(table, name), (table, name))
            config = _config(table, name)
            starts.setdefault(_kind(config), set()).add(config["start"])
    labels = {}
    for key, (table, name) in found.items():
        arm, config = table.study.arms[name], _config(table, name)
        label = arm.label
        if not table.study.many_networks and config["reduction"] is None and config["where"] is None:
            label = LABELS.get(config["attention"] or "plain") or arm.label
            if config["forked"]:
                label = f"trained, then: {label}"
            if config["attention"] and len(starts[_kind(config)]) > 1:
                label += ", paper's start" if config["start"] == "paper" else f", {config['start']} start"
        labels[key] = label
    return labels


def _rows_that_count(table: Table) -> list[str]:
    return [name for name in table.arms if len(table.runs.get(name, {})) >= SEEDS]


def _config(table: Table, arm: str) -> dict[str, Any]:
    return next(iter(table.runs[arm].values()))["config"]


def _kind(config: dict[str, Any]) -> tuple:
    return config["network"], config["attention"], config["forked"]


def _key(table: Table, arm: str) -> str:
    """What tells the runs of a row from those of others, in whatever study."""
    config = _config(table, arm)
    names = ("network", "attention", "start", "forked", "reduction", "where")
    return json.dumps([config.get(name) for name in names])


def _rows(columns: list[list[Table]], labels: dict[str, str]) -> tuple[str, list[str]]:
    """The rows of all columns, by the first measure; and in words how many seeds they have."""
    levels: list[dict[str, tuple[str, str]]] = []
    for tables in columns:
        levels.append({})
        for table in tables:
            for name, row in zip(table.arms, level_rows(table)[1:], strict=True):
                if name in _rows_that_count(table):
                    levels[-1].setdefault(_key(table, name), (row[4], row[3]))
    every = {n for column in levels for _, n in column.values()}
    rows = []
    for key, label in labels.items():
        cells = [column.get(key, ("-", "")) for column in levels]
        shown = [level if len(every) == 1 or not n else f"{level} ({n})" for level, n in cells]
        rows.append(f"| {as_markdown(label)} | {' | '.join(shown)} |")
    return f"{min(every)} seeds" if len(every) == 1 else "in brackets the seeds", rows


def _differences(tables: list[Table], labels: dict[str, str]) -> list[tuple[str, dict]]:
    """The comparisons of one training, each once."""
    found = {}
    for table in tables:
        counted = _rows_that_count(table)
        for row in differences(table, table.first.key):
            if "word" in row and row["arm"] in counted and row["against"] in counted:
                pair = _key(table, row["arm"]), _key(table, row["against"])
                found.setdefault(pair, (f"{labels[pair[0]]} against {labels[pair[1]]}", row))
    return list(found.values())


def _shown(every: list[str]) -> str:
    """What is shown by a column that is not the one to go by; the rest stands on the pages of its tables."""
    told = [sentence for sentence in every if sentence.startswith(("Better", "Worse"))]
    rest = ["No difference is shown in the rest."] if told else ["No difference is shown."]
    return " ".join(told + (rest if len(told) < len(every) else []))


def _links(tables: list[Table]) -> str:
    pages = [
        f"[{table.study.name}{'' if _closeness(table) == _closeness(tables[0]) else ', ' + parts(table)[4]}]"
        f"(results/{table.study.name}/{table.name}.md)"
        for table in tables
    ]
    return f"The whole tables: {'; '.join(pages)}."
