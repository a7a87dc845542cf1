"""Put the results on detectors into docs/detection.md: `python -m docs.fill_boxes`, or `make evidence`.

The studies on detectors come from results/, the comparison with torchvision's own loop and the time of a step
from benchmarks/results. The text between the markers of the page is replaced.
"""

import json
from pathlib import Path
from typing import Any

from cbam.studies.printing import level_rows, outcome, status
from cbam.studies.records import Records
from cbam.studies.report import as_markdown
from cbam.studies.tables import STUDIES
from cbam.studies.tabulate import Table, tables

ROOT = Path(__file__).parents[1]
PAGE, RESULTS, MEASURED = ROOT / "docs/detection.md", ROOT / "results", ROOT / "benchmarks/results"
SETTINGS = ("size", "regions", "limit", "epochs", "batch_size")
NEAR = 3.0  # expected agreement between the engine and torchvision's loop, in points of AP50


def page(text: str) -> str:
    """The page with both parts recomputed."""
    for marker, lines in (("bccd", _studies()), ("step", _steps())):
        before, rest = text.split(f"<!-- {marker} -->")
        after = rest.split(f"<!-- /{marker} -->")[1]
        inside = "\n".join(["", *lines, ""]) if lines else "\n"
        text = f"{before}<!-- {marker} -->{inside}<!-- /{marker} -->{after}"
    return text


def _studies() -> list[str]:
    lines: list[str] = []
    for name in ("coco", "voc"):
        for table in tables(STUDIES[name], Records(RESULTS, name).all().values()):
            link = f"[The table](../results/{name}/{table.name}.md)"
            lines += ["", f"### {as_markdown(table.study.title)}: {as_markdown(table.shared['data'])}", ""]
            lines += [f"{link}. {status(table)} {_settings(table)}", ""]
            header, *body = level_rows(table)
            lines += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
            lines += ["| " + " | ".join(map(as_markdown, row)) + " |" for row in body]
            lines += [line for sentence in outcome(table) for line in ("", as_markdown(sentence))]
            lines += _loop(table)
    return lines


def _settings(table: Table) -> str:
    shared, about = table.shared, table.about
    size = "" if shared["size"] is None else f" with a shorter side of {shared['size']} px"
    regions = f", {shared['regions']} regions per image" if shared.get("regions") else ""
    devices = {run["device"]["name"] for runs in table.runs.values() for run in runs.values()}
    return (
        f"{about['train']} training and {about['val']} validation images{size}{regions}; "
        f"{shared['epochs']} epochs from scratch, {', '.join(sorted(devices))}."
    )


def _loop(table: Table) -> list[str]:
    """Compare the plain detector of the study with the loop, for the seeds that both have."""
    path = MEASURED / "detection-loop.jsonl"
    if not path.exists() or table.study.name != "coco":
        return []
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    same = [line for line in lines if all(line[name] == table.shared.get(name) for name in SETTINGS)]
    ours = table.runs.get("resnet18", {})
    compared = []
    for line in same:
        if line["seed"] in ours:
            last = ours[line["seed"]]["epochs"][-1]
            apart = last["val_ap50"] - line["val_ap50"]
            word = "within" if abs(apart) <= NEAR else "not within"
            compared.append(
                f"seed {line['seed']}: AP50 {last['val_ap50']:.1f} with the engine, {line['val_ap50']:.1f} "
                f"with the loop ({word} {NEAR:g} points); AP {last['val_ap']:.1f} and {line['val_ap']:.1f}"
            )
    if not compared:
        return []
    return [
        "",
        "The plain detector against a separate training loop in the style of torchvision's references, with "
        f"its own network, order and flips (`benchmarks/detection_loop.py`): {'; '.join(compared)}. Given "
        "the same batches, the engine and such a loop end bit-identical (`tests/train/test_detection.py`).",
    ]


def _steps() -> list[str]:
    lines: list[str] = []
    for path in sorted(MEASURED.glob("detection-c*-torch*.json")):
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
        regions = f", {result['regions']} regions" if result["regions"] else ""
        lines += [
            "",
            "Time of a training step with attention against a plain one, "
            f"{result['device']['name']} ({result['device']['type']}), torch {result['torch']}, "
            f"batches of {result['batch']} at {result['size']} px{regions}; "
            f"median and quartiles of the ratios over {result['turns']} alternating steps "
            "(`python -m benchmarks.detection`):",
            "",
            "| detector | attention | plain, ms | ratio | quartiles |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['detector']} | {row['attention']} | {row['plain_ms']:.0f} | {row['ratio']:.3f} | "
            f"{row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f} |"
            for row in result["rows"]
        ]
    return lines


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
