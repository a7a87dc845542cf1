"""The README's summary of the studies on photographs: one table with the rows of all complete tables.

The table covers the training closest to the protocol; other trainings are summarised in sentences, and those
on a part of a data set in a line. Rows shared by several studies appear once, and rows with too few seeds not
at all.
"""

import json
from collections.abc import Collection, Iterator
from typing import Any

from cbam.studies.printing import by_word, format_interval, format_level, warm_up
from cbam.studies.report import LABELS, as_markdown, by_chance
from cbam.studies.study import SEEDS
from cbam.studies.tabulate import Table, compared, differences, levels

LABELS_HERE = LABELS | {"channel": "channel, average and maximum", "cbam-max": "channel, maximum"}


def cited(judged: list[Table]) -> str:
    """Summarise the tables, grouped by network and data set."""
    about = [(table.shared.get("network"), table.shared["data"]) for table in judged]
    groups = [
        [table for table, own in zip(judged, about, strict=True) if own == one]
        for one in dict.fromkeys(about)
    ]
    groups = [sorted(group, key=_closeness, reverse=True) for group in groups]
    return "\n\n".join(
        _briefly(group) if _is_of_a_part(group) else _together(group)
        for group in sorted(groups, key=_is_of_a_part)
    )


def _is_of_a_part(tables: list[Table]) -> bool:
    """Whether the training used only a part of the data set."""
    return bool(tables[0].shared.get("limit"))


def parts(table: Table) -> list[str]:
    """The training settings of a table, as a list of phrases."""
    shared = table.shared
    size = shared["size"] or table.about["size"]
    return [
        f"{table.about['train']} images" + (f" of {size} px" if size else ""),
        f"{shared['epochs']} epochs",
        f"batch {shared['batch_size']}",
        shared["precision"],
        f"learning rate {shared['lr']:g}",
        warm_up(shared) or "no warm-up",
    ]


def _closeness(table: Table) -> tuple[bool, bool]:
    """Sort key: how close a table is to the protocol. The closest is the main comparison."""
    return table.usual, bool(table.shared.get("warmup_epochs"))


def _together(tables: list[Table]) -> str:
    trainings: dict[str, list[Table]] = {}
    for table in tables:
        trainings.setdefault(", ".join(parts(table)), []).append(table)
    (how, main), *others = trainings.items()
    labels, title = _labels(tables), main[0].first.title
    named = as_markdown(f"{main[0].shared.get('network', 'several networks')} on {main[0].shared['data']}")
    rows, to_plain = _rows(main, labels)
    between = _differences(main, labels, but=to_plain)
    seeds = sorted({len(table.runs[name]) for table, name in _counted(main)})
    span = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    lines = [f"**{named}**: {how}; {title} in %, {span} seeds.", ""]
    column = "error" if main[0].first.lower_is_better else title
    lines += [f"| | {column} | against plain | |", "|---|---|---|---|", *rows, ""]
    if between:
        lines += [as_markdown(_shown("Between the attention modules", by_word(title, between))), ""]
    count = len(to_plain) + len(between)
    for settings, own in others:
        apart = ", ".join(part for part in settings.split(", ") if part not in how.split(", "))
        found = _differences(own, labels)
        count += len(found)
        lines.append(as_markdown(_shown(f"With {apart}", by_word(title, found))) + "\n")
    return "\n".join([*lines, by_chance(count, " here"), "", _links(tables)])


def _briefly(tables: list[Table]) -> str:
    labels, first = _labels(tables), tables[0]
    sentences = [
        sentence for table in tables for sentence in by_word(table.first.title, _differences([table], labels))
    ]
    what = "detectors" if "AP" in first.first.title else "networks"
    where = f"For {what} trained on only {first.about['train']} images of {first.shared['data']}"
    return f"{as_markdown(_shown(where, sentences))} {_links(tables)}"


def _labels(tables: list[Table]) -> dict[str, str]:
    """A label for every kind of run, by its key; it includes the start of attention if that differs."""
    found: dict[str, tuple[Table, str]] = {}
    starts: dict[tuple, set[str]] = {}
    for table, name in _counted(tables):
        found.setdefault(_key(table, name), (table, name))
        config = _config(table, name)
        starts.setdefault(_kind(config), set()).add(config["start"])
    labels = {}
    for key, (table, name) in found.items():
        arm, config = table.study.arms[name], _config(table, name)
        label = arm.label
        if not table.study.many_networks and config["reduction"] is None and config["where"] is None:
            label = LABELS_HERE.get(config["attention"] or "plain") or arm.label
            if config["forked"]:
                label = f"trained, then: {label}"
            if config["attention"] and len(starts[_kind(config)]) > 1:
                label += ", paper's start" if config["start"] == "paper" else f", {config['start']} start"
        labels[key] = label
    return labels


def _counted(tables: list[Table]) -> Iterator[tuple[Table, str]]:
    """Yield every row with enough seeds."""
    for table in tables:
        for name in table.arms:
            if len(table.runs.get(name, {})) >= SEEDS:
                yield table, name


def _config(table: Table, arm: str) -> dict[str, Any]:
    return next(iter(table.runs[arm].values()))["config"]


def _kind(config: dict[str, Any]) -> tuple:
    return config["network"], config["attention"], config["forked"]


def _key(table: Table, arm: str) -> str:
    """The key that identifies a kind of run across studies."""
    config = _config(table, arm)
    names = ("network", "attention", "start", "forked", "reduction", "where")
    return json.dumps([config.get(name) for name in names])


def _rows(tables: list[Table], labels: dict[str, str]) -> tuple[list[str], set[tuple[str, str]]]:
    """A line for each kind of run, with its difference from the plain one; and the pairs compared."""
    found: dict[str, tuple[Table, str]] = {}
    for table, name in _counted(tables):
        found.setdefault(_key(table, name), (table, name))
    lines, pairs = [], set()
    for key, (table, name) in found.items():
        measure, config = table.first, _config(table, name)
        level = next(row for row in levels(table) if row["arm"] == name)[measure.key]
        cells = [as_markdown(labels[key]), format_level(level), "", ""]
        base = next((k for k, (t, n) in found.items() if _is_plain_of(_config(t, n), config)), None)
        if base is not None and base != key:
            own, theirs = table.values(name, measure.key), found[base][0].values(found[base][1], measure.key)
            row = compared(own, theirs, measure)
            cells[2:] = [format_interval(row), row["word"]]
            pairs.add((key, base))
        lines.append(f"| {' | '.join(cells)} |")
    return lines, pairs


def _is_plain_of(config: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `config` is that of the plain network with which `other` is compared."""
    same = all(config.get(name) == other.get(name) for name in ("network", "forked"))
    return same and not config["attention"]


def _differences(
    tables: list[Table], labels: dict[str, str], but: Collection[tuple[str, str]] = ()
) -> list[tuple[str, dict]]:
    """The distinct comparisons of one training, without those in `but`."""
    found, counted = {}, {(id(table), name) for table, name in _counted(tables)}
    for table in tables:
        for row in differences(table, table.first.key):
            if {(id(table), row["arm"]), (id(table), row["against"])} <= counted and "word" in row:
                pair = _key(table, row["arm"]), _key(table, row["against"])
                if pair not in but:
                    found.setdefault(pair, (f"{labels[pair[0]]} against {labels[pair[1]]}", row))
    return list(found.values())


def _shown(where: str, every: list[str]) -> str:
    """The differences that are shown; the full tables have the others."""
    shown = [sentence for sentence in every if sentence.startswith(("Better", "Worse"))]
    if not shown:
        return f"{where}, no difference is shown."
    rest = ["No difference is shown in the rest."] if len(shown) < len(every) else []
    return f"{where}: {' '.join([shown[0][0].lower() + shown[0][1:], *shown[1:], *rest])}"


def _links(tables: list[Table]) -> str:
    def label(table: Table) -> str:
        usual = _closeness(table) == _closeness(tables[0])
        return table.study.name if usual else ", ".join([table.study.name, *parts(table)[4:]])

    pages = [f"[{label(table)}](results/{table.study.name}/{table.name}.md)" for table in tables]
    return f"Full tables: {'; '.join(pages)}."
