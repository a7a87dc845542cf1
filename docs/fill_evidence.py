"""Write docs/evidence.md from the records in results/: `python -m docs.fill_evidence`, or `make evidence`.

The tables and figures of the studies are recomputed first, and the results on photographs go into README.md.
Statements about results are computed; the text about how they came about is written here.
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
from docs.markers import between

ROOT = Path(__file__).parents[1]
RESULTS, MEASURED = ROOT / "results", ROOT / "benchmarks" / "results"
PAGE, README = Path(__file__).parent / "evidence.md", ROOT / "README.md"
BEGIN, END = "<!-- evidence:begin -->", "<!-- evidence:end -->"

OPENING = """\
# The evidence

`cbam study` trains the rows of the paper's tables and of four more, keeps one record per run, and computes
the tables from the records. This page lists what they show so far, where attention does not help, and how
many more runs would settle what is open. `make evidence` writes it from `results/`; no measured number is
typed by hand.
"""

DIGITS_ARE_NOT = """\
**The digits are not the evidence.** They are enlarged handwriting of 8x8 pixels, and a network of
{parameters:,} parameters trained for {steps} steps. They show that the studies run, and what attention costs
such a network early in training. They say nothing about photographs, ImageNet or a converged network. The
README cites only the tables on photographs.
"""

REDUCED = """\
## On photographs, reduced

Without a GPU the full trainings take weeks. These ran on CPUs, with smaller images, fewer of them or fewer
epochs. What they show holds for such a training; a longer one may end differently. A table is partial if
fewer than half of its rows have {seeds} seeds, and is then left out of the sections below.
"""

STILL = """\
## Still to be run

These full trainings, by the protocol of each data set, have no complete table yet. {missing}

On one GPU. The script needs no internet access, stops when the given time is over, and resumes when called
again:

```sh
benchmarks/gpu_studies.sh path/to/imagenette96 25
```

It trains ResNet18, 34 and 50, plain, with SE and with CBAM; then, on ResNet18, the studies channel, spatial,
order, peers and start. Each row takes {seeds} seeds of {epochs} epochs from scratch in bfloat16, with the
images kept on the device. The settings were fixed before the first of these runs: learning rate, momentum and
weight decay are the paper's, the batch size is {batch}, and a half-cosine schedule replaces the steps that
the paper makes over 90 epochs. There are {warmup:g} epochs of warm-up, because the trainings on CPUs showed
that this learning rate needs them.

## ImageNet on 8 GPUs

One process per GPU; each takes a run that no other process works on. Runs that have a record are not
repeated, and an interrupted run resumes from its last checkpoint:

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

- The learning rate of the digits, {lr:g}, is that of `cbam compare`. It was chosen there by the validation
  error of the plain network.
- The studies on the digits were planned with 6 epochs at batch size 32, a choice made by run time. After
  {first} runs the plain network ended at {error:.0f} % error, far from trained, so epochs and batch size were
  changed, once, to {epochs} and {batch}. That decision had seen validation errors, also of rows with
  attention. The records of the first plan are kept, in a table of their own.
- On the digits, ten rows of the study peers were run first. They were selected by run time, before any of
  them had a result. The start study was run there after the harm in the other tables was seen.
- Apart from this list, no setting was changed after a result. The last epoch of every run counts, not the
  best.
- {photographs}
"""
NO_PHOTOGRAPHS = "Imagenette and ImageNet: none, no run has been made there."
PHOTOGRAPHS = """\
Imagenette: image size and number of epochs were chosen by run time on one core, before the first run. The
  table at learning rate 0.1 without warm-up came first. There the plain network started with a loss above
  that of guessing, and its error depended on the seed; a network damped by attention did not. Therefore the
  table at 0.02 was added, and two epochs of warm-up became part of the protocol. One plain network, with seed
  0, was tried with warm-up first; it is one of the runs in the table at 0.1 with warm-up. ImageNet: none, no
  run has been made there."""


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    found = _found(results)
    every = [table for own in found.values() for table in own]
    usual = [table for table in every if table.usual]
    reduced = [table for table in every if table not in usual and table.shared["data"] != DIGITS]
    on_digits = [table for table in usual if table.shared["data"] == DIGITS]
    whole = [table for table in usual if table not in on_digits]
    judged = [table for table in whole + reduced + on_digits if not table.partial]
    parts = [OPENING, _count(every), _listing(whole), _reduced(reduced), _on_digits(on_digits)]
    parts += [_shown(judged), _open(judged), _choices(found, usual + reduced), _still(usual)]
    return "\n".join(part for part in parts if part)


def readme(text: str, results: Path = RESULTS) -> str:
    """The README with the results of the tables on photographs."""
    every = [table for own in _found(results).values() for table in own]
    judged = [table for table in every if table.shared["data"] != DIGITS and not table.partial]
    return between(text, BEGIN, END, cited(judged) or "There are no tables on photographs yet.")


def _found(results: Path) -> dict[str, list[Table]]:
    return {name: tables(study, Records(results, name).all().values()) for name, study in STUDIES.items()}


def _runs(table: Table) -> list[dict[str, Any]]:
    return [run for own in table.runs.values() for run in own.values()]


def _count(every: list[Table]) -> str:
    runs = {json.dumps(run["config"], sort_keys=True): run for table in every for run in _runs(table)}
    hours = sum(run["seconds"] for run in runs.values()) / 3600
    return (
        f"There are records of {len(runs)} different runs, {hours:.1f} hours in all. A run whose "
        "settings\nappear in several tables was trained once and counts in each of them, so the tables are "
        "not independent of\neach other.\n"
    )


def _listing(tables: list[Table]) -> str:
    if not tables:
        return ""
    lines = ["| table | runs | state |", "| --- | --- | --- |"]
    for table in tables:
        link = f"[{as_markdown(title(table))}](../results/{table.study.name}/{table.name}.md)"
        lines.append(f"| {link} | {len(_runs(table))} | {status(table)} |")
    return "\n".join(lines) + "\n"


def _on_digits(tables: list[Table]) -> str:
    runs = [run for table in tables for run in table.runs.get("plain", {}).values()]
    if not runs:
        return ""
    steps = runs[0]["config"]["epochs"] * -(-runs[0]["data"]["train"] // runs[0]["config"]["batch_size"])
    note = DIGITS_ARE_NOT.format(steps=steps, parameters=runs[0]["parameters"])
    return f"## On the digits\n\n{note}\n{_listing(tables)}"


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
    """The study and the data, with the training settings if they are not the usual ones."""
    name = f"{table.study.name}, {table.shared['data']}"
    return name if table.usual else f"{name} ({_settings(table)})"


def _shown(judged: list[Table]) -> str:
    """List the differences whose interval excludes zero, better and worse."""
    count = sum("word" in row for table in judged for row in differences(table, table.first.key))
    lines = ["## What is shown", "", by_chance(count, " here"), ""]
    for word, heading in (
        ("better", "Lower top-1 error, or higher average precision:"),
        ("worse", "Higher error, or lower average precision (attention, or the change to it, does harm):"),
    ):
        rows = [line for table in judged for line in _rows(table, word)]
        lines += [heading, "", *(rows or ["- nothing"]), ""]
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
    """List the open differences, and how many pairs would settle them."""
    lines = [
        "## What is open",
        "",
        "No difference is shown in these. *Would show* is the smallest true difference that this many pairs",
        "detect with 80 % power; *pairs to settle* is how many would detect one of the size found.",
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
    return "\n".join(lines) + "\n" if count else "\n".join(lines[:1]) + "\n\nNothing.\n"


def _choices(found: dict[str, list[Table]], every: list[Table]) -> str:
    """CHOICES with the numbers of the first plan, which was abandoned."""
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
            "`python -m benchmarks.imagenet_hours` measures the throughput, computes how many hours this "
            "takes, and\nwrites both down for this page. It has not run on a GPU yet, so there is no number "
            "here."
        )
    result = json.loads(measured[-1].read_text("utf-8"))
    return "\n".join(imagenet_hours.lines(result, seeds=SEEDS, devices=8))


def main() -> None:
    """Compute all tables and figures, and write the page."""
    for name, study in STUDIES.items():
        write_tables(Records(RESULTS, name), study)
    PAGE.write_text(page(), "utf-8")
    README.write_text(readme(README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
