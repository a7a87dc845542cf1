"""docs/kernels.md is computed from the files in benchmarks/results."""

import csv

import pytest

from docs.fill_kernels import BEGIN, END, README, RESULTS, fill, fill_readme

ROW = {
    "op": "attention", "implementation": "timm", "shape": "8x4x7x7", "dtype": "float32", "layout": "NCHW",
    "mode": "inference", "ms": "2.0", "ratio": "1.0", "low": "1.0", "high": "1.0", "rounds": "11",
    "kernels": "True", "threads": "2", "device": "A device", "torch": "2.15.0", "commit": "abc",
    "floor": "6272", "bandwidth": "",
}  # fmt: skip


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "kernels.md"
    path.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    (tmp_path / "results").mkdir()
    return path


def write(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_without_results_the_page_says_so(page):
    fill(page, page.parent / "results")
    assert "No machine's results" in page.read_text()
    assert page.read_text().startswith("above\n")
    assert page.read_text().endswith("\nbelow\n")


def test_the_table_has_a_row_per_case_and_a_column_per_implementation(page):
    ours = ROW | {"implementation": "cbam", "ms": "0.5", "ratio": "0.25", "low": "0.2", "high": "0.3"}
    write(page.parent / "results" / "a.csv", ROW, ours | {"bandwidth": "0.8"})
    write(page.parent / "results" / "other.csv", {"network": "resnet18"})
    fill(page, page.parent / "results")
    text = page.read_text()
    assert "| what | timm | cbam |" in text
    assert "| attention 8x4x7x7 NCHW inference | 2 ms | 0.25 [0.20, 0.30] |" in text
    assert "### A device, float32, torch 2.15.0" in text
    assert (page.parent / "img" / "bandwidth.svg").stat().st_size > 1000
    assert "old" not in text


def test_the_readme_shows_one_network_with_the_default_memory_setting(page):
    plain = ROW | {"op": "resnet50", "implementation": "plain", "shape": "8x3x224x224", "memory": ""}
    ours = plain | {"implementation": "cbam", "ratio": "1.01", "low": "0.9", "high": "1.1"}
    results = page.parent / "results"
    write(results / "a.csv", ROW | {"memory": ""}, plain, ours)
    write(results / "a-memory-kept.csv", *(row | {"memory": "kept", "ratio": "7"} for row in (plain, ours)))
    fill_readme(page, results)
    assert page.read_text().count("| resnet50 8x3x224x224 NCHW inference | 2 ms | 1.01 [0.90, 1.10] |") == 1
    assert "7.00" not in page.read_text()
    assert "attention" not in page.read_text()


def networks(gate="passed", op="resnet50", **changes):
    plain = ROW | {"op": op, "implementation": "plain", "shape": "8x3x224x224", "gate": gate, **changes}
    return plain, plain | {"implementation": "cbam", "ratio": "1.50", "low": "1.4", "high": "1.6"}


def test_unverified_and_quick_rows_are_not_shown(page):
    results = page.parent / "results"
    write(results / "networks-A-device.csv", *networks("unverified"))
    write(results / "A-device-quick.csv", *networks())
    for put in (fill, fill_readme):
        put(page, results)
        assert "No machine's results" in page.read_text()


def test_the_files_of_one_machine_give_one_section_with_each_case_once(page):
    results = page.parent / "results"
    write(results / "blocks-A-device.csv", ROW | {"gate": "passed"})
    again = [row | {"ms": "9.0", "ratio": "9.0"} for row in networks()]
    write(results / "compiled-A-device.csv", *again, *networks(op="resnet50, compiled"))
    write(results / "networks-A-device.csv", *networks())
    fill(page, results)
    assert page.read_text().count("### A device") == 1
    assert page.read_text().count("| resnet50 8x3x224x224 NCHW inference | 2 ms | 1.50 [1.40, 1.60] |") == 1
    assert page.read_text().count("| resnet50, compiled 8x3x224x224 NCHW inference |") == 1
    assert "9.00" not in page.read_text()
    fill_readme(page, results)
    assert page.read_text().count("| resnet50 ") == 1


def test_differences_between_the_rows_of_a_machine_are_reported(page):
    results, commit = page.parent / "results", "0123456789abcdef"
    write(
        results / "a.csv",
        ROW | {"commit": commit, "gate": "passed"},
        *networks(rounds="5", commit=f"{commit}+changes"),
    )
    fill(page, results)
    assert "2 threads, fused kernels, commit `0123456789ab`, `0123456789ab+changes`, 5 or 11 rounds" in (
        page.read_text()
    )
    fill_readme(page, results)
    assert "of 5 rounds in alternation" in page.read_text()
    write(results / "a.csv", ROW, ROW | {"op": "end of a block", "threads": "1", "kernels": "False"})
    fill(page, results)
    assert "2 threads, fused kernels" in page.read_text()
    assert "1 threads, no kernels" in page.read_text()


def test_the_timings_in_the_readme_are_up_to_date(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text("utf-8"), "utf-8")
    fill_readme(copy, RESULTS)
    assert copy.read_text("utf-8") == README.read_text("utf-8")
