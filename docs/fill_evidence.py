"""Write docs/evidence.md from the records in results/: `python -m docs.fill_evidence`, or `make evidence`.

Tables and figures of the studies are computed anew first; what they show on photographs goes into README.md.
What is said of a result is computed; what a reader must know of how it came about stands here in words.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks import imagenet_hours
from cbam.studies.conduct import write_tables
from cbam.studies.printing import status, title
from cbam.studies.records import Records
from cbam.studies.report import as_markdown, by_chance
from cbam.studies.statistics import MOST_PAIRS
from cbam.studies.study import DIGITS, SEEDS, digits, imagenette
from cbam.studies.tables import STUDIES
from cbam.studies.tabulate import Table, differences, tables
from docs.citing import cited, parts

ROOT = Path(__file__).parents[1]
RESULTS, MEASURED = ROOT / "results", ROOT / "benchmarks" / "results"
PAGE, README = Path(__file__).parent / "evidence.md", ROOT / "README.md"
BEGIN, END = "<!-- evidence:begin -->", "<!-- evidence:end -->"

OPENING = """\
# What the evidence is

`cbam study` trains the rows of the paper's tables, and of four more, and computes the tables from one record
per run. This page says what they show so far, where attention does not help, and what it would take to
settle what is open. `make evidence` writes it from the records in `results/`; no measured number is typed.
"""

DIGITS_ARE_NOT = """\
**The digits are not the evidence.** They are handwriting of 8x8 pixels, enlarged, and a network of
{parameters:,} parameters, trained for {steps} steps. They show that the studies run, and what an attention
costs such a network at the start of its training; they say nothing about photographs, ImageNet or a network
that has converged. Of these tables the README cites those on photographs alone.
"""

REDUCED = """\
## On photographs, with less

Without a GPU the whole trainings take weeks. These were made on CPUs, with smaller pictures, fewer of them or
fewer epochs. What they show is true of such a training; a longer one may end otherwise. A table is partial
where less than half of its rows have {seeds} seeds; it is left out of what follows.
"""

STILL = """\
## Still to be run

Of the whole trainings, as each data set's protocol has them. {missing}

On one GPU, without a network; it stops with the time that it is given, and the same command goes on:

```sh
benchmarks/gpu_studies.sh path/to/imagenette96 25
```

ResNet18, 34 and 50, plain, SE and CBAM; then, on ResNet18, channel, spatial, order, peers and start;
{epochs} epochs from scratch, {seeds} seeds of every row, the pictures on the device, in bfloat16. The
settings are fixed before the first of these runs: rate, momentum and weight decay are the paper's, the batch
is {batch}, and half a cosine stands in place of the steps that the paper makes over 90 epochs.
{warmup:g} epochs of warm-up lead to the rate: the trainings on CPUs have shown that it takes them.

## ImageNet on 8 GPUs

One process per GPU; each takes a run that nobody is at. What has a record is not repeated, and a run that is
stopped, or whose machine dies, goes on from its last checkpoint:

```sh
for gpu in 0 1 2 3 4 5 6 7; do
    CUDA_VISIBLE_DEVICES=$gpu cbam study networks mobile channel spatial order \\
        --dataset path/to/imagenet --workers 12 &
done; wait
```

{hours}
"""

CHOICES = """\
## Choices that were made on validation sets

- The learning rate of the digits, {lr:g}, is that of `cbam compare`. It was chosen there from trainings of
  the plain network, whose validation error was seen.
- The studies on the digits were planned with 6 epochs at batch 32, by the time that a run takes. {first} runs
  of that plan were made; the plain network ended at {error:.0f} % error, far from trained, and epochs and
  batch were changed, once, to {epochs} and {batch}. That was decided on validation errors, those of rows with
  attention among them. The records of the first plan are kept, as a table of their own.
- On the digits, ten rows of peers were run first; they were picked by the time that they take, before any of
  them had a result. The start study was run there because the harm in the other tables was seen.
- Beyond what this list says, no setting was changed after a result. The last epoch of every run
  counts, not the best.
- {photographs}
"""
NO_PHOTOGRAPHS = "Imagenette and ImageNet: none, no run has been made there."
PHOTOGRAPHS = """\
Imagenette: the size of the pictures and the number of epochs, by the time that a run takes on one core, and
  before the first run. The table at a rate of 0.1 without a warm-up came first. There the plain network began
  with a loss above that of guessing, and its error depended on the seed; a network that attention damps did
  not. So the table at 0.02 was added, and two epochs of warm-up were put into the protocol: one plain
  network, of seed 0, was tried with them first, and it is a run of the table at 0.1 that was then filled
  with them. ImageNet: none, no run has been made there."""


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    found = _found(results)
    every = [table for own in found.values() for table in own]
    usual = [table for table in every if table.usual]
    reduced = [table for table in every if table not in usual and table.shared["data"] != DIGITS]
    judged = [table for table in usual + reduced if not table.partial]
    parts = [OPENING, _count(every), _listing(usual), _digits_note(usual), _reduced(reduced)]
    parts += [_shown(judged), _open(judged), _choices(found, usual + reduced), _still(usual)]
    return "\n".join(part for part in parts if part)


def readme(text: str, results: Path = RESULTS) -> str:
    """The README, with what the tables on photographs show."""
    every = [table for own in _found(results).values() for table in own]
    judged = [table for table in every if table.shared["data"] != DIGITS and not table.partial]
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    said = cited(judged) or "No table on photographs is there yet."
    return f"{before}{BEGIN}\n{said}\n{END}{after}"


def _found(results: Path) -> dict[str, list[Table]]:
    return {name: tables(study, Records(results, name).all().values()) for name, study in STUDIES.items()}


def _runs(table: Table) -> list[dict[str, Any]]:
    return [run for own in table.runs.values() for run in own.values()]


def _count(every: list[Table]) -> str:
    distinct = {json.dumps(run["config"], sort_keys=True) for table in every for run in _runs(table)}
    hours = sum(
        run["seconds"] for run in {r["created"] + r["arm"]: r for t in every for r in _runs(t)}.values()
    )
    return (
        f"There are records of {len(distinct)} different runs, {hours / 3600:.1f} hours in all. A run whose "
        "settings\nstand in several tables was trained once and enters each of them, so the tables are not "
        "independent of each\nother.\n"
    )


def _listing(usual: list[Table]) -> str:
    lines = ["| table | runs | state |", "| --- | --- | --- |"]
    for table in usual:
        link = f"[{as_markdown(title(table))}](../results/{table.study.name}/{table.name}.md)"
        lines.append(f"| {link} | {len(_runs(table))} | {status(table)} |")
    return "\n".join(lines) + "\n"


def _digits_note(usual: list[Table]) -> str:
    runs = [run for t in usual if t.shared["data"] == DIGITS for run in t.runs.get("plain", {}).values()]
    if not runs:
        return ""
    steps = runs[0]["config"]["epochs"] * -(-runs[0]["data"]["train"] // runs[0]["config"]["batch_size"])
    return DIGITS_ARE_NOT.format(steps=steps, parameters=runs[0]["parameters"])


def _reduced(tables: list[Table]) -> str:
    if not tables:
        return ""
    lines = [REDUCED.format(seeds=SEEDS), "| table | training | runs | state |", "| --- | --- | --- | --- |"]
    for table in tables:
        link = f"[{as_markdown(title(table))}](../results/{table.study.name}/{table.name}.md)"
        lines.append(f"| {link} | {_settings(table)} | {len(_runs(table))} | {status(table)} |")
    return "\n".join(lines) + "\n"


def _settings(table: Table) -> str:
    return ", ".join(parts(table))


def _where(table: Table) -> str:
    """The study and the data, and how it was trained where that is not the usual way."""
    name = f"{table.study.name}, {table.shared['data']}"
    return name if table.usual else f"{name} ({_settings(table)})"


def _shown(judged: list[Table]) -> str:
    """Differences whose interval leaves out zero, both ways."""
    count = sum("word" in row for table in judged for row in differences(table, table.first.key))
    lines = ["## What is shown", "", by_chance(count, " here"), ""]
    for word, told in (
        ("better", "Lower top-1 error, or higher average precision:"),
        ("worse", "Higher error, or lower precision: attention, or what was changed of it, does harm"),
    ):
        rows = [line for table in judged for line in _rows(table, word)]
        lines += [told, "", *(rows or ["- nothing"]), ""]
    return "\n".join(lines)


def _rows(table: Table, word: str) -> list[str]:
    labels = {name: arm.label for name, arm in table.study.arms.items()}
    found = []
    for row in differences(table, table.first.key):
        if row.get("word") == word:
            paper = (
                ""
                if row["paper"] is None
                else f"; the paper on {table.study.paper_data}: {row['paper']:+.2f}"
            )
            interval = "no interval" if row["low"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}"
            found.append(
                f"- {_where(table)}: {labels[row['arm']]} against "
                f"{labels[row['against']]}: {row['mean']:+.2f} points ({interval}, {row['n']} seeds{paper})"
            )
    return found


def _open(judged: list[Table]) -> str:
    """What is not settled, and how many pairs would settle it."""
    lines = [
        "## What is open",
        "",
        "No difference is shown in these. Beside each: the smallest true difference that so many pairs",
        "show in four cases of five, and how many would show one of the size found, if it is the true one.",
        "",
        "| study | | against | points | pairs | would show | pairs to settle |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    count = 0
    for table in judged:
        labels = {name: arm.label for name, arm in table.study.arms.items()}
        for row in differences(table, table.first.key):
            if row.get("word") == "no difference shown" and row["resolution"] is not None:
                count += 1
                needed = f"over {MOST_PAIRS:,}" if row["needed"] is None else row["needed"]
                names = f"{_where(table)} | {labels[row['arm']]} | {labels[row['against']]}"
                lines.append(
                    f"| {names} | {row['mean']:+.2f} | {row['n']} | {row['resolution']:.2f} | {needed} |"
                )
    return "\n".join(lines) + "\n" if count else "\n".join(lines[:1]) + "\n\nNothing that was run.\n"


def _choices(found: dict[str, list[Table]], every: list[Table]) -> str:
    """The words of CHOICES with the numbers of the first plan, which was given up."""
    first = [
        t for own in found.values() for t in own if (t.shared["epochs"], t.shared["batch_size"]) == (6, 32)
    ]
    if not first:
        return ""
    errors = [error for table in first for error in table.values("plain", "val_top1").values()]
    protocol = digits()
    return CHOICES.format(
        first=sum(len(_runs(table)) for table in first),
        error=sum(errors) / len(errors),
        lr=protocol.lr,
        batch=protocol.batch_size,
        epochs=protocol.epochs,
        photographs=PHOTOGRAPHS if any(_is_imagenette(table) for table in every) else NO_PHOTOGRAPHS,
    )


def _is_imagenette(table: Table) -> bool:
    return table.shared["data"].startswith("imagenette")


def _still(usual: list[Table]) -> str:
    there = {table.study.name for table in usual if table.shared["data"] != DIGITS and not table.partial}
    wanted = [
        name for name in ("networks", "channel", "spatial", "order", "peers", "start") if name not in there
    ]
    missing = f"On Imagenette: {', '.join(wanted)}." if wanted else "On Imagenette: nothing."
    large = {t.study.name for t in usual if not t.small and not t.partial}
    for data in dict.fromkeys(study.paper_data for study in STUDIES.values()):
        names = [n for n, study in STUDIES.items() if study.paper_data == data and n not in large]
        missing += f" On {data}: {', '.join(names) or 'nothing'}."
    protocol = imagenette()
    return STILL.format(
        missing=missing,
        seeds=SEEDS,
        epochs=protocol.epochs,
        batch=protocol.batch_size,
        hours=_hours(),
        warmup=protocol.warmup_epochs,
    )


def _hours() -> str:
    measured = sorted(MEASURED.glob("imagenet-*.json"))
    if not measured:
        return (
            "How many hours that takes is computed from a throughput that is measured:\n"
            "`python -m benchmarks.imagenet_hours` prints it and writes it down for this page. It has not\n"
            "been measured on a GPU yet, so no number stands here."
        )
    told = json.loads(measured[-1].read_text("utf-8"))
    return "\n".join(imagenet_hours.lines(told, seeds=SEEDS, devices=8))


def main() -> None:
    """Compute all tables and figures, and write the page."""
    for name, study in STUDIES.items():
        write_tables(Records(RESULTS, name), study)
    PAGE.write_text(page(), "utf-8")
    README.write_text(readme(README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
