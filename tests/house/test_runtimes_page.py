"""The table of docs/export.md is computed from benchmarks/results."""

import csv

from docs import fill_runtimes
from docs.fill_runtimes import BEGIN, END

ROW = {
    "runtime": "onnx", "network": "resnet18", "attention": "plain", "batch": "1", "threads": "2",
    "ms": "50.04", "ratio": "1.0", "low": "1.0", "high": "1.0", "rounds": "15", "load": "0.5",
    "version": "1.32.0", "device": "A device", "torch": "2.15.0", "commit": "0123456789abcdef",
}  # fmt: skip
SE = ROW | {"attention": "se", "ratio": "1.0449", "low": "1.0", "high": "1.1"}
CBAM = ROW | {"attention": "cbam", "ratio": "1.2", "low": "1.19", "high": "1.213"}


def test_the_runtimes_page_is_up_to_date():
    said = fill_runtimes.PAGE.read_text("utf-8")
    assert fill_runtimes.page(said) == said, "make evidence"


def test_a_network_on_a_runtime_is_a_row_of_ratios_with_quartiles(tmp_path):
    with (tmp_path / "runtimes-x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerows([ROW, SE, CBAM])
    said = fill_runtimes.page(f"above {BEGIN} old {END} below", tmp_path)
    assert "| resnet18 | ONNX Runtime | 50.0 | 1.04 (1.00 to 1.10) | 1.20 (1.19 to 1.21) |" in said
    assert "A device, threads 2, batch 1" in said
    assert "ONNX Runtime 1.32.0; commit `0123456789ab`" in said
    assert "old" not in said


def test_changed_code_is_not_reported_as_its_commit():
    changed = [row | {"commit": "0123456789abcdef+changes"} for row in (ROW, SE, CBAM)]
    assert fill_runtimes.section(changed).count("commit `0123456789ab+changes`.") == 1


def test_without_results_the_page_says_so(tmp_path):
    assert "Nothing has been measured yet." in fill_runtimes.page(f"{BEGIN}{END}", tmp_path)
