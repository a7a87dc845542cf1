import json
import resource
import signal

import pytest

from cbam.errors import ConfigError, OutputError
from cbam.studies.folder import PAGE, REPORT, RESULTS, ReportFolder


def test_looking_at_a_folder_leaves_nothing_behind(tmp_path):
    # C10
    ReportFolder(tmp_path / "deep" / "report")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused_without_overwrite(tmp_path):
    # C7
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty: give another --out, or --overwrite"):
        ReportFolder(tmp_path)


def test_overwriting_replaces_an_earlier_report_whole_and_nothing_else(tmp_path):
    # C7
    for name in ("thesis.tex", RESULTS, REPORT, PAGE):
        (tmp_path / name).write_text("old")
    folder = ReportFolder(tmp_path, overwrite=True)
    assert (tmp_path / PAGE).read_text() == "old"
    folder.write_results({"new": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [RESULTS, "thesis.tex"]
    assert json.loads((tmp_path / RESULTS).read_text()) == {"new": 1}
    assert (tmp_path / "thesis.tex").read_text() == "old"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    # C1
    (tmp_path / "report").write_text("a file")
    with pytest.raises(ConfigError, match="is a file"):
        ReportFolder(tmp_path / "report")
    with pytest.raises(OutputError, match="cannot write to") as caught:
        ReportFolder(tmp_path / "report" / "below")
    assert caught.value.exit_code == 7


def test_a_place_that_cannot_be_written_is_found_before_any_work():
    # K16; root may write anywhere but here
    with pytest.raises(OutputError, match="give another --out"):
        ReportFolder("/proc/self/report")


def test_a_full_disk_keeps_the_old_file_and_leaves_no_part_of_the_new(tmp_path):
    # K13
    folder = ReportFolder(tmp_path)
    folder.write(REPORT, "old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            folder.write(REPORT, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(REPORT, "old")]


def test_a_write_that_is_interrupted_leaves_no_part(tmp_path, monkeypatch):
    # C10
    def stop(_):
        raise KeyboardInterrupt

    folder = ReportFolder(tmp_path)
    monkeypatch.setattr("cbam.studies.folder.os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        folder.write(REPORT, "text")
    assert list(tmp_path.iterdir()) == []


def test_results_are_strict_json(tmp_path):
    folder = ReportFolder(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_results({"loss": float("nan")})
