"""results.json -> what a reader sees: numbers, sentences and a table, all computed from the record."""

import statistics
import textwrap
from typing import Any

from cbam.studies.statistics import CONFIDENCE, median_ratio, paired_difference, spread

LABELS = {
    "plain": "plain",
    "se": "SE",
    "cbam": "CBAM",
    "channel": "channel only",
    "spatial": "spatial only",
    "eca": "ECA",
    "scse": "scSE",
    "bam": "BAM",
    "gc": "GC",
    "coordatt": "CoordAtt",
    "simam": "SimAM",
    "triplet": "Triplet",
    "gct": "GCT",
    "sk": "SK",
    "gam": "GAM",
    "ema": "EMA",
}

# key, title, unit in the table, whether lower is better
MEASURES = (
    ("top1", "top-1 error", "%", True),
    ("top5", "top-5 error", "%", True),
    ("energy_inside", "Grad-CAM energy in the true box", "%", False),
)


def summary(results: dict) -> dict[str, dict[str, Any]]:
    """Per arm: means and spreads over seeds, differences from plain paired by seed, cost, time.

    Of an interrupted comparison, the differences use the seeds that both the arm and plain finished.
    """
    runs = {(run["arm"], run["seed"]): run for run in results["runs"]}
    return {arm["name"]: _of_arm(arm, runs, results) for arm in results["arms"]}


def _of_arm(arm: dict, runs: dict, results: dict) -> dict[str, Any]:
    name = arm["name"]
    found: dict[str, Any] = {key: arm[key] for key in ("parameters", "gmac", "sites")}
    for key, _, _, lower in MEASURES:
        own = {seed: run[key] for (n, seed), run in runs.items() if n == name and run[key] is not None}
        if not own:
            continue
        values = list(own.values())
        found[key] = {"mean": statistics.fmean(values), "spread": spread(values), "n": len(values)}
        plain = {seed: run[key] for (n, seed), run in runs.items() if n == "plain"}
        both = [seed for seed in own if plain.get(seed) is not None]
        if name != "plain" and both:
            found[f"{key}_difference"] = paired_difference(
                [own[seed] for seed in both], [plain[seed] for seed in both], lower_is_better=lower
            )
    for kind, seconds in results["timing"].get(name, {}).items():
        found[kind] = median_ratio(seconds, results["timing"]["plain"][kind])
    return found


def verdict(results: dict) -> list[str]:
    """What the comparison shows, one sentence per arm."""
    sentences = []
    for name, numbers in summary(results).items():
        parts = [
            _finding(title, numbers[f"{key}_difference"])
            for key, title, _, _ in MEASURES
            if key != "top5" and f"{key}_difference" in numbers
        ]
        if parts:
            sentences.append(f"{LABELS[name]} against plain: {'; '.join(parts)}.")
    return sentences or ["No training was finished, so there is nothing to compare."]


def _finding(measure: str, difference: dict) -> str:
    points, seeds = f"{difference['mean']:+.2f} points", difference["n"]
    if seeds == 1:
        return f"{measure} {points} with one seed, which shows nothing"
    if difference["low"] is None:
        return (
            f"no difference shown in {measure} ({points} with each of {seeds} seeds, so there is no interval)"
        )
    word = {"no difference shown": "no difference shown in ", "better": "better ", "worse": "worse "}
    interval = f"95 % interval {difference['low']:+.2f} to {difference['high']:+.2f}"
    return f"{word[difference['word']]}{measure} ({points}, {interval}, {seeds} seeds)"


def table(results: dict) -> list[list[str]]:
    """The table as rows of cells: a header, then a row per measure; a column per arm."""
    found = summary(results)
    rows = [["", *(LABELS[name] for name in found)]]
    for key, title, unit, _ in MEASURES:
        if any(key in numbers for numbers in found.values()):
            rows.append([f"{title}, {unit}", *(_level(numbers.get(key)) for numbers in found.values())])
            differences = [numbers.get(f"{key}_difference") for numbers in found.values()]
            rows.append(["  difference from plain", *(_points(d) for d in differences)])
            rows.append(["  95 % interval", *(_interval(d) for d in differences)])
            rows.append(["  verdict", *(d["word"] if d else "" for d in differences)])
    rows.append(["parameters", *(f"{numbers['parameters']:,}" for numbers in found.values())])
    rows.append(["GMAC per image", *(f"{numbers['gmac']:.4f}" for numbers in found.values())])
    for kind, title in (("train", "training time, plain = 1"), ("inference", "inference time, plain = 1")):
        if results["timing"]:
            rows.append([title, *(_ratio(numbers.get(kind)) for numbers in found.values())])
    return rows


def _level(numbers: dict | None) -> str:
    if numbers is None:
        return "-"
    return f"{numbers['mean']:.2f}" + ("" if numbers["spread"] is None else f" ± {numbers['spread']:.2f}")


def _points(difference: dict | None) -> str:
    return f"{difference['mean']:+.2f}" if difference else ""


def _interval(difference: dict | None) -> str:
    if difference is None:
        return ""
    return "none" if difference["low"] is None else f"{difference['low']:+.2f} to {difference['high']:+.2f}"


def _ratio(numbers: dict | None) -> str:
    if numbers is None:
        return "-"
    if numbers["low"] == numbers["high"] == 1:
        return "1"
    return f"{numbers['ratio']:.2f} ({numbers['low']:.2f} to {numbers['high']:.2f})"


def notes(results: dict) -> list[str]:
    """How to read the table, and what a reader must know about this run."""
    found = []
    if results["status"] != "complete":
        found.append(
            f"This comparison did not finish ({results['status']}); the table holds what was completed."
        )
    found += [
        "± is the standard deviation over seeds. Differences are paired by seed: arms of one seed start from "
        "the same weights and see the same images in the same order.",
        'The interval is Student\'s t over the seeds\' differences; "better" and "worse" mean that it '
        "excludes zero.",
        *_chance(results),
        "Times are relative to plain, measured alternately on the machine below: the median of the ratios "
        "per round, with their quartiles in brackets.",
    ]
    if results["data"]["has_boxes"]:
        found.append(
            "Grad-CAM energy is the share of the map for the true class that lies inside the true box, "
            "averaged over the validation images."
        )
    found.append(_start_note(results))
    found += results["data"]["notes"]
    return found


def _chance(results: dict) -> list[str]:
    """How many intervals are expected to exclude zero by chance."""
    found = summary(results).values()
    differences = [numbers.get(f"{key}_difference") for numbers in found for key, *_ in MEASURES]
    count = sum(d is not None and d["n"] > 1 for d in differences)
    return [by_chance(count)] if count > 1 else []


def by_chance(count: int, where: str = "") -> str:
    """A sentence: how many of `count` intervals are expected to exclude zero by chance."""
    tested = "1 difference is" if count == 1 else f"{count} differences are"
    return (
        f"{tested} tested{where}. If there were no true difference, {count * (1 - CONFIDENCE):.2f} of the "
        "intervals would be expected to exclude zero by chance."
    )


def _start_note(results: dict) -> str:
    if results["config"]["from_scratch"]:
        return "Every arm was trained from scratch, attention initialised as in the paper's released code."
    checks = [run["identity"] for run in results["runs"] if run["identity"]]
    if not checks:
        return "No arm with attention was finished; attention is attached with the identity start."
    equal = sum(check["bit_equal"] for check in checks)
    pictures = checks[0]["pictures"]
    return (
        f"Attached with the identity start: logits on {pictures} validation images are bit-identical before "
        f"and after in {equal} of {len(checks)} cases."
    )


def facts(results: dict) -> list[tuple[str, str]]:
    """What was run, and on what, as (name, value) pairs."""
    config, data, device = results["config"], results["data"], results["device"]
    pairs = [
        (
            "data",
            f"{data['name']}: {data['train']} training and {data['val']} validation images of "
            f"{data['size']} px, {len(data['classes'])} classes",
        ),
        ("network", f"{config['model']}, attention at {max(arm['sites'] for arm in results['arms'])} places"),
        ("protocol", results["protocol"]),
    ]
    pairs += [(f"recipe, {phase}", _recipe(recipe)) for phase, recipe in results["recipes"].items()]
    pairs += [
        ("seeds", ", ".join(map(str, sorted({run["seed"] for run in results["runs"]}))) or "none finished"),
        ("device", f"{device['name']} ({device['type']}, {device['threads']} threads)"),
        (
            "run time",
            f"{results['seconds'] / 60:.1f} minutes, peak memory {results['memory_gib']:.2f} GiB",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items())),
        ("commit", results["commit"] or "unknown"),
        ("date", results["created"]),
    ]
    return pairs


def _recipe(recipe: dict) -> str:
    return (
        f"{recipe['epochs']} epochs, batch {recipe['batch_size']}, {recipe['optimizer']}, learning rate "
        f"{recipe['lr']:g} ({recipe['schedule']}), momentum {recipe['momentum']:g}, "
        f"weight decay {recipe['weight_decay']:g}"
    )


def title(results: dict) -> str:
    """The headline of the report."""
    arms = [LABELS[arm["name"]] for arm in results["arms"]]
    return f"{' / '.join(arms)}: {results['config']['model']} on {results['data']['name']}"


def picture_caption(results: dict) -> str:
    """What the image shows, and how its rows were chosen."""
    shown = results["picture"]
    return (
        f"Seed {shown['seed']}, {LABELS[shown['arm']]} next to plain. Rows: the first validation image of "
        f"{shown['rows']} classes, evenly spaced over the class list, chosen before training. Under each "
        "map: the probability of the true class."
    )


def text(results: dict) -> str:
    """The table and the verdict as plain text."""
    rows = table(results)
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", *(textwrap.fill(sentence, 100) for sentence in verdict(results))])


def markdown(results: dict, picture: str | None) -> str:
    """The text of report.md; `picture` is the file name of the image."""
    header, *rows = table(results)
    lines = [
        f"# {as_markdown(title(results))}",
        "",
        *(line for sentence in verdict(results) for line in (as_markdown(sentence), "")),
    ]
    lines += ["| " + " | ".join(map(as_markdown, header)) + " |", "|" + " --- |" * len(header)]
    lines += [
        "| " + " | ".join(as_markdown(cell.replace("  ", "", 1)) for cell in row) + " |" for row in rows
    ]
    lines += ["", *(f"- {as_markdown(note)}" for note in notes(results)), ""]
    if picture:
        lines += [f"![Grad-CAM and feature maps]({picture})", "", as_markdown(picture_caption(results)), ""]
    lines += [
        "## What was run",
        "",
        *(f"- {as_markdown(name)}: {as_markdown(value)}" for name, value in facts(results)),
        "",
    ]
    return "\n".join(lines)


def as_markdown(cell: str) -> str:
    """The text as one line, escaped for Markdown and HTML."""
    for mark in "\\`*_|<>[]&~":
        cell = cell.replace(mark, f"\\{mark}")
    return " ".join(cell.split())
