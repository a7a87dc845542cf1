"""results/ has records of clean commits, and tables, figures and a page computed from them."""

import json
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest

from cbam.studies import machine
from cbam.studies.drawing import figure
from cbam.studies.printing import markdown
from cbam.studies.records import Records, counts, read
from cbam.studies.study import run_key
from cbam.studies.tables import STUDIES
from cbam.studies.tabulate import tables
from docs import fill_boxes, fill_evidence

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
RECORDS = sorted(RESULTS.glob("*/*.json"))


def test_there_are_only_records_of_the_studies():
    assert RECORDS
    assert {path.parent.name for path in RECORDS} <= set(STUDIES)
    assert {path.suffix for path in RESULTS.glob("*/*") if path.is_file()} <= {".json", ".md", ".svg"}


def test_every_record_is_complete_and_named_by_its_settings():
    for path in RECORDS:
        record = read(path)
        assert counts(record), path
        assert path.stem.endswith(f"-s{record['seed']}-{run_key(record['config'])}"), path
        assert len(record["epochs"]) == record["config"]["epochs"], path
        assert len(record["versions"]) > 2, path


def test_the_sources_of_a_record_are_those_of_its_commit():
    origins = {(record["commit"], record["source"]) for record in map(read, RECORDS)}
    for commit, source in origins:
        there = subprocess.run(
            ["git", "-C", ROOT, "cat-file", "-e", commit], capture_output=True, check=False
        )
        if there.returncode:
            pytest.skip(f"the history here does not reach {commit[:8]}")
        assert machine.source_of(commit, ROOT) == source, commit


def test_a_record_in_several_studies_is_identical_in_each():
    content: dict[str, bytes] = {}
    for path in RECORDS:
        record = read(path)
        key = f"{record['study']} {run_key(record['config'])} {record['created']}"
        assert content.setdefault(key, path.read_bytes()) == path.read_bytes(), path


@pytest.mark.parametrize("name", STUDIES)
def test_tables_and_figures_are_computed_from_the_records(name):
    records = Records(RESULTS, name)
    made = tables(STUDIES[name], records.all().values())
    assert {path.stem for path in records.path.glob("*.md")} == {table.name for table in made}, (
        "make evidence"
    )
    for table in made:
        drawn, drawing = figure(table), records.path / f"{table.name}.svg"
        page = (records.path / f"{table.name}.md").read_text("utf-8")
        assert page == markdown(table, drawing.name if drawn else None), "make evidence"
        assert (drawing.read_text("utf-8") if drawing.exists() else None) == drawn, "make evidence"


def test_the_evidence_page_is_up_to_date():
    assert fill_evidence.PAGE.read_text("utf-8") == fill_evidence.page(), "make evidence"


def test_the_results_in_the_readme_are_up_to_date(tmp_path):
    text = fill_evidence.README.read_text("utf-8")
    assert text == fill_evidence.readme(text), "make evidence"
    assert "There are no tables on photographs yet." in fill_evidence.readme(text, tmp_path)


def test_the_readme_has_one_row_per_kind_of_run_with_its_difference_to_plain(tmp_path):
    everything = cited()
    assert everything.count("With ") == 2  # the runs without a warm-up
    assert "With no warm-up: better in top-1 error: CBAM, paper's start against plain (" in everything
    assert "For detectors trained on only 96 images of bccd, no difference is shown. Full" in everything
    assert "| ResNet18-FPN" not in everything  # a part of a data set gets no table
    for path in RECORDS:
        config = read(path)["config"]
        if config["data"] == "imagenette96" and config["warmup_epochs"] and path.parent.name != "networks":
            (tmp_path / path.parent.name).mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / path.parent.name)
    warmed = cited(tmp_path)
    rows = [line.split(" | ")[0] for line in warmed.splitlines() if " ± " in line]
    arranged = ["| spatial, then channel", "| channel and spatial in parallel"]
    pools = ["| channel, maximum", "| channel, average and maximum"]
    forked = [f"| trained, then: {arm}" for arm in ("plain", "CBAM, paper's start", "CBAM, identity start")]
    scratch = ["| plain", "| SE", *pools, "| CBAM, paper's start", *arranged, "| CBAM, identity start"]
    assert rows == scratch + forked
    for name in ("spatial, then channel", "SE"):
        own, plain = values(tmp_path, name), values(tmp_path, "plain")
        mean = statistics.fmean(own[seed] - plain[seed] for seed in plain)
        assert f"| {name} | {statistics.fmean(own.values()):.2f} ± " in warmed
        assert f" | {mean:+.2f} (" in next(line for line in warmed.splitlines() if f"| {name} |" in line)
    assert "Between the attention modules, no difference is shown." in warmed
    assert "18 differences are tested here" in warmed
    shutil.rmtree(tmp_path / "order")
    shutil.rmtree(tmp_path / "start")
    assert "5 differences are tested here" in cited(tmp_path)


def test_the_readme_names_the_metric_of_a_table_of_detectors(tmp_path):
    (tmp_path / "coco").mkdir()
    for path in (path for path in RECORDS if path.parent.name == "coco"):
        record = read(path)
        whole = record | {"config": record["config"] | {"limit": None}}
        (tmp_path / "coco" / path.name).write_text(json.dumps(whole))
    assert "| | AP | against plain | |" in cited(tmp_path)


def values(results, row):
    """The last error by seed of a row of the README."""
    settings = {
        "plain": ("", "paper"),
        "SE": ("se", "paper"),
        "spatial, then channel": ("cbam-reversed", "paper"),
    }
    records = [r for path in results.rglob("*.json") if not (r := read(path))["config"]["forked"]]
    chosen = [r for r in records if (r["config"]["attention"], r["config"]["start"]) == settings[row]]
    return {r["config"]["seed"]: r["epochs"][-1]["val_top1"] for r in chosen}


def cited(results=RESULTS):
    """What the README says about these records."""
    text = fill_evidence.readme(fill_evidence.README.read_text("utf-8"), results)
    return text.split(fill_evidence.BEGIN)[1].split(fill_evidence.END)[0]


def test_the_page_says_that_the_digits_are_not_the_evidence():
    assert "**The digits are not the evidence.**" in fill_evidence.page()


def test_the_detection_page_is_up_to_date():
    said = fill_boxes.PAGE.read_text("utf-8")
    assert fill_boxes.page(said) == said, "make evidence"
