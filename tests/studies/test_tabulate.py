"""Tables and figures of invented records."""

import re
import statistics
import xml.etree.ElementTree as ElementTree

import pytest
from scipy import stats

from cbam.errors import DataError
from cbam.studies.drawing import figure
from cbam.studies.printing import facts, markdown, outcome, status, text
from cbam.studies.study import digits, run_config
from cbam.studies.tables import STUDIES
from cbam.studies.tabulate import differences, levels, tables

STUDY = STUDIES["channel"]
ABOUT = {"name": "cluttered_digits", "train": 1437, "val": 1080, "size": 64, "classes": 10, "sha256": "x"}
PLAIN = [20.0, 22.0, 21.0, 23.0, 19.0]
BETTER = [17.0, 19.5, 18.0, 20.5, 16.0]  # lower by 3, 2.5, 3, 2.5 and 3
SAME = [21.0, 22.0, 21.0, 22.0, 20.0]


def record(arm: str, seed: int, top1: float, **changes) -> dict:
    return {
        "schema": 1, "study": "channel", "arm": arm, "seed": seed, "status": "complete",
        "config": run_config(digits(), STUDY.arms[arm], seed), "data": ABOUT, "commit": "c" * 40,
        "dirty": False, "source": "s", "versions": {"torch": "2"},
        "device": {"type": "cpu", "name": "a <processor>", "threads": 1}, "parameters": 1000, "gmac": 0.5,
        "sites": 3, "epochs": [{"val_top1": 90.0, "val_top5": 9.0}, {"val_top1": top1, "val_top5": top1 / 4}],
        "start": None, "seconds": 20.0, "processor_seconds": 19.0,
    } | changes  # fmt: skip


def rows(arm: str, values: list[float], **changes) -> list[dict]:
    return [record(arm, seed, value, **changes) for seed, value in enumerate(values)]


@pytest.fixture
def table():
    (made,) = tables(STUDY, [*rows("plain", PLAIN), *rows("avg", BETTER), *rows("max", SAME)])
    return made


def test_levels_are_mean_and_spread_of_the_last_epoch(table):
    found = {row["arm"]: row for row in levels(table)}
    assert found["plain"]["val_top1"] == {"mean": statistics.fmean(PLAIN), "spread": statistics.stdev(PLAIN)}
    assert found["plain"]["val_top5"]["mean"] == pytest.approx(statistics.fmean(PLAIN) / 4)
    assert found["avg"]["paper"] == (23.14, 6.70)
    assert found["both"]["val_top1"] is None
    assert [found[name]["n"] for name in STUDY.arms] == [5, 5, 5, 0]


def test_differences_are_paired_by_seed_and_shown_with_the_papers(table):
    found = {(row["arm"], row["against"]): row for row in differences(table, "val_top1")}
    row = found["avg", "plain"]
    interval = stats.ttest_rel(BETTER, PLAIN).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert (row["paper"], row["word"], row["n"]) == (-1.42, "better", 5)
    assert found["max", "plain"]["word"] == "no difference shown"
    assert found["max", "plain"]["needed"] > 5
    assert found["both", "plain"]["n"] == 0
    assert "word" not in found["both", "plain"]


def test_an_unpaired_seed_counts_in_the_level_but_not_in_a_difference():
    (table,) = tables(STUDY, [*rows("plain", PLAIN[:3]), *rows("avg", BETTER)])
    (row,) = [row for row in differences(table, "val_top1") if row["arm"] == "avg"]
    assert (row["n"], sorted(row["each"])) == (3, [0, 1, 2])
    assert next(row["n"] for row in levels(table) if row["arm"] == "avg") == 5


@pytest.mark.parametrize(
    ("seeds", "arms", "told"),
    [
        (5, ["plain", "avg", "max", "both"], "Complete: 4 of 4 rows have 5 seeds or more."),
        (5, ["plain", "avg"], "2 of 4 rows have 5 seeds or more."),
        (5, ["plain"], "Partial: 1 of 4 rows have 5 seeds or more. This table does not count as run."),
        (4, ["plain", "avg", "max", "both"],
         "Partial: 0 of 4 rows have 5 seeds or more. This table does not count as run."),
    ],
)  # fmt: skip
def test_too_few_seeds_or_rows_make_a_partial_table(seeds, arms, told):
    (table,) = tables(STUDY, [r for arm in arms for r in rows(arm, PLAIN[:seeds])])
    assert status(table) == told
    assert table.partial == told.startswith("Partial")


@pytest.mark.parametrize(
    "change", [{"dirty": True}, {"dirty": None}, {"commit": None}, {"status": "NonFiniteError: nan"}]
)
def test_failed_runs_and_runs_of_changed_code_never_count(change):
    (table,) = tables(STUDY, [*rows("plain", PLAIN), *rows("avg", BETTER, **change)])
    assert list(table.runs) == ["plain"]
    assert (len(table.failed), table.changed) == ((5, 0) if "status" in change else (0, 5))
    assert "do not count" in markdown(table, None)


def test_other_settings_give_another_table_with_another_name():
    longer = [record("plain", 0, 10.0, config=run_config(digits(), STUDY.arms["plain"], 0) | {"epochs": 80})]
    first, second = tables(STUDY, [*rows("plain", PLAIN), *longer])
    assert first.name == "channel-digits"
    assert second.name.startswith("channel-digits-resnet_tiny-")
    assert second.values("plain", "val_top1") == {0: 10.0}


def test_table_names_are_valid_in_links_for_any_folder_name():
    names, digits_config = [], run_config(digits(), STUDY.arms["plain"], 0)
    for data in ("my pics (2) | <b>", "my_pics_2_b_", "../a"):
        (table,) = tables(STUDY, [record("plain", 0, 10.0, config=digits_config | {"data": data})])
        assert re.fullmatch(r"channel-[A-Za-z0-9_.]+-resnet_tiny-[0-9a-f]{6}", table.name)
        names.append(table.name)
    assert len(set(names)) == 3


@pytest.mark.parametrize("change", [{"train": 900}, {"sha256": "y"}, {"files": "b"}, {"objects": "b"}])
def test_records_of_other_images_are_refused(change):
    older, named = rows("plain", PLAIN), rows("avg", BETTER, data=ABOUT | {"files": "a", "objects": "a"})
    (table,) = tables(STUDY, [*older, *named])
    assert {name: len(runs) for name, runs in table.runs.items()} == {"plain": 5, "avg": 5}
    with pytest.raises(DataError, match="two data sets named digits have records here: max seed 0"):
        tables(STUDY, [*older, *named, *rows("max", SAME, data=ABOUT | change)])


def test_a_record_reused_from_another_study_is_identified_by_its_settings():
    records = [*rows("avg", BETTER), *rows("plain", PLAIN)]
    (table,) = tables(STUDIES["peers"], records)
    assert {arm: len(runs) for arm, runs in table.runs.items()} == {"se": 5, "plain": 5}
    assert dict(facts(table))["runs"] == "10, 10 of them reused from other studies"
    assert tables(STUDIES["mobile"], rows("avg", BETTER)) == []


def test_milestones_are_printed_without_brackets():
    config = run_config(digits(), STUDY.arms["plain"], 0) | {"schedule": "step", "milestones": [4, 6]}
    (table,) = tables(STUDY, [record("plain", 0, 20.0, config=config)])
    assert dict(facts(table))["training"].endswith(", fp32, divided by 10 after epochs 4, 6")


@pytest.mark.parametrize("change", [{"parameters": 1001}, {"gmac": 0.6}, {"sites": 4}])
def test_a_row_with_runs_of_different_networks_is_reported(table, change):
    told = "The runs of + average (= SE) are not all of the same network"
    assert told not in markdown(table, None) + text(table)
    (mixed,) = tables(
        STUDY, [*rows("plain", PLAIN), *rows("avg", BETTER[:4]), record("avg", 4, 16.0, **change)]
    )
    assert markdown(mixed, None).count(told) == text(mixed).count(told) == 1


def test_the_page_shows_what_was_computed(table):
    page = markdown(table, "channel-digits.svg")
    assert "| + average (= SE) | plain | -1.42 | -2.80 | -3.14 to -2.46 | better | 5 |" in page
    assert "Better in top-1 error: + average (= SE) against plain (-2.80 points, -3.14 to -2.46)." in page
    assert "No difference shown in top-1 error: + maximum against plain" in page
    assert "5 differences are tested" not in page
    assert "3 differences are tested. If there were no true difference, 0.15 of the intervals" in page
    assert "| + average and maximum | - | - | 0 | - | 22.80 | - | 6.52 |" in page
    assert "(channel-digits.svg)" in page
    assert f"{'c' * 40} (15)" in page
    assert "a \\<processor\\>" in page


def test_the_same_table_is_shown_in_a_terminal(table):
    shown = text(table)
    assert re.search(r"\+ average \(= SE\) +plain +-1\.42 +-2\.80 +-3\.14 to -2\.46 +better +5", shown)
    assert outcome(table)[0].startswith("Better in top-1 error")


def test_the_figure_is_drawn_inside_its_frame(table):
    root = ElementTree.fromstring(figure(table))
    _, _, wide, high = map(float, root.attrib["viewBox"].split())
    circles = [node for node in root.iter() if node.tag.endswith("circle")]
    assert len(circles) == 3 * 5
    for circle in circles:
        assert 320 <= float(circle.attrib["cx"]) <= wide
        assert 0 <= float(circle.attrib["cy"]) <= high
    drawn = "".join(text for text in root.itertext())
    assert "+ average (= SE)against plain" in drawn.replace("\n", "")
    assert "+ average and maximum" not in drawn  # it has no runs


def test_there_is_no_figure_without_a_pair():
    (table,) = tables(STUDY, rows("plain", PLAIN))
    assert figure(table) is None
    assert "tested" not in markdown(table, None)


def test_one_pair_is_drawn_but_not_counted_as_an_interval():
    (table,) = tables(STUDY, [*rows("plain", PLAIN[:1]), *rows("avg", BETTER[:1])])
    assert figure(table)
    assert "tested" not in markdown(table, None)


def test_equal_differences_have_no_interval_but_are_drawn():
    (table,) = tables(STUDY, [*rows("plain", PLAIN), *rows("avg", [value - 1 for value in PLAIN])])
    assert "| -1.00 | none | no difference shown | 5 | - | - |" in markdown(table, None)
    assert figure(table)


def test_identical_runs_are_drawn_too():
    (table,) = tables(STUDY, [*rows("plain", PLAIN), *rows("avg", PLAIN)])
    assert figure(table)
