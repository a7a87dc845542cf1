import copy
import re
from html.parser import HTMLParser

import pytest

from cbam.studies.page import page
from cbam.studies.report import as_markdown, markdown, summary, table, text, verdict


def cells(results, name):
    return next(row[1:] for row in table(results) if row[0].strip() == name)


def test_the_summary_has_means_spreads_and_paired_differences(results):
    found = summary(results)
    assert found["plain"]["top1"] == {"mean": 11.0, "spread": 1.0, "n": 3}
    assert found["cbam"]["top1"]["mean"] == pytest.approx(9.0)
    assert found["cbam"]["top1_difference"]["mean"] == pytest.approx(-2.0)
    assert found["cbam"]["top1_difference"]["word"] == "better"
    assert found["cbam"]["energy_inside_difference"]["word"] == "worse"
    assert found["se"]["top1_difference"]["word"] == "no difference shown"
    assert "top1_difference" not in found["plain"]
    assert found["cbam"]["train"]["ratio"] == pytest.approx(2.1)


def test_the_table_shows_the_arms_side_by_side(results):
    assert table(results)[0] == ["", "plain", "SE", "CBAM"]
    assert cells(results, "top-1 error, %") == ["11.00 ± 1.00", "11.07 ± 0.51", "9.00 ± 1.05"]
    assert cells(results, "difference from plain")[0] == ""
    assert cells(results, "verdict") == ["", "no difference shown", "better"]
    assert cells(results, "parameters") == ["1,000", "1,100", "1,200"]
    assert cells(results, "inference time, plain = 1")[0] == "1"
    assert cells(results, "inference time, plain = 1")[2] == "2.00 (2.00 to 2.00)"


def test_the_verdict_is_computed_in_both_directions(results):
    assert "CBAM against plain: better top-1 error (-2.00 points, 95 % interval" in " ".join(verdict(results))
    assert "; worse Grad-CAM energy in the true box (-1.00 points, " in " ".join(verdict(results))
    for run in results["runs"]:
        if run["arm"] == "cbam":
            run["top1"] += 4
    assert "CBAM against plain: worse top-1 error (+2.00 points" in " ".join(verdict(results))


def test_one_seed_shows_nothing_and_says_so(results):
    results["runs"] = [run for run in results["runs"] if run["seed"] == 0]
    assert "top-1 error -2.00 points with one seed, which shows nothing" in " ".join(verdict(results))
    assert cells(results, "95 % interval") == ["", "none", "none"]
    assert cells(results, "top-1 error, %") == ["10.00", "10.50", "8.00"]


def test_an_interrupted_comparison_pairs_only_the_seeds_that_both_finished(results):
    # C10
    results["status"] = "interrupted"
    results["runs"] = [run for run in results["runs"] if (run["arm"], run["seed"]) != ("cbam", 2)]
    assert summary(results)["cbam"]["top1_difference"]["n"] == 2
    results["runs"] = [run for run in results["runs"] if run["arm"] == "plain"]
    assert cells(results, "top-1 error, %") == ["11.00 ± 1.00", "-", "-"]
    assert "No training was finished" in " ".join(verdict(results))
    assert "did not finish (interrupted)" in markdown(results, None)
    results["timing"] = {}
    assert not any("time, plain = 1" in row[0] for row in table(results))
    page(results, None)


def test_top_five_is_reported_only_if_measured(results):
    assert any(row[0].startswith("top-5") for row in table(results))
    results["runs"][0]["energy_inside"] = None  # plain of one seed: the others are pairs
    assert summary(results)["cbam"]["energy_inside_difference"]["n"] == 2
    for run in results["runs"]:
        run["top5"] = run["energy_inside"] = None
    assert not any(row[0].startswith(("top-5", "Grad-CAM")) for row in table(results))


def test_a_report_is_a_pure_function_of_the_results(results):
    before = copy.deepcopy(results)
    assert markdown(results, "picture.png") == markdown(results, "picture.png")
    assert page(results, b"png") == page(results, b"png")
    assert results == before


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br", "circle", "polyline", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_without_external_resources(results):
    written = page(results, b"\x89PNG")
    tags = _Tags()
    tags.feed(written)
    assert tags.open == []
    assert not {"script", "link", "iframe", "b"} & set(tags.seen)
    assert not re.search(r"https?:|url\(|@import", written)
    (picture,) = (value for name, value in tags.attributes if name == "src")
    assert picture.startswith("data:image/png;base64,")
    assert "width=device-width" in written


def test_names_from_the_data_cannot_inject_markup_into_the_report(results):
    # W13
    results["data"]["name"] = "<img src=x onerror=alert(1)>|[a](javascript:b)"
    results["data"]["notes"] = ["<script>alert(1)</script>"]
    written = page(results, None)
    assert "<img" not in written
    assert "<script" not in written
    told = markdown(results, None)
    assert "\\<script\\>" in told
    assert "\\[a\\](javascript" in told
    assert as_markdown("R&amp;D ~~old~~") == r"R\&amp;D \~\~old\~\~"


def test_the_start_of_the_arms_is_reported_for_an_unfinished_comparison_too(results):
    told = {
        False: "logits on 32 validation images are bit-identical before and after in 6 of 6 cases",
        True: "Every arm was trained from scratch",
    }
    for from_scratch, words in told.items():
        results["config"]["from_scratch"] = from_scratch
        assert words in markdown(results, None)
    results["config"]["from_scratch"] = False
    results["runs"] = results["runs"][:1]  # plain, of the first seed
    assert "No arm with attention was finished" in markdown(results, None)
    assert "from scratch" not in markdown(results, None)


def test_the_report_says_how_many_differences_are_tested(results):
    told = (
        "6 differences are tested. If there were no true difference, 0.30 of the intervals would be expected"
    )
    assert told in markdown(results, None)
    assert told in page(results, None)
    for runs in ([run for run in results["runs"] if run["seed"] == 0], results["runs"][:1]):
        results["runs"] = runs  # one seed has no interval
        assert "are tested" not in markdown(results, None)


def test_the_markdown_table_has_equal_rows(results):
    rows = [line for line in markdown(results, "picture.png").splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert len(rows) == len(table(results)) + 1


def test_the_terminal_text_fits_a_wide_terminal_and_ends_with_the_verdict(results):
    lines = text(results).splitlines()
    assert " ".join(" ".join(lines).split()).endswith(" ".join(verdict(results)))
    assert max(map(len, lines)) <= 110
