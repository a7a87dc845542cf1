import json
import resource
import signal

import pytest

from cbam.errors import ConfigError, OutputError
from cbam.studies.folder import PAGE, REPORT, RESULTS, ReportFolder


def test_checking_a_folder_creates_nothing(tmp_path):
    # C10
    ReportFolder(tmp_path / "deep" / "report")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused_without_overwrite(tmp_path):
    # C7
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty: give another --out, or --overwrite"):
        ReportFolder(tmp_path)


def test_overwriting_replaces_all_of_an_earlier_report_and_no_other_file(tmp_path):
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


def test_an_unwritable_folder_is_refused_before_any_work():
    # K16; root may write anywhere but here
    with pytest.raises(OutputError, match="give another --out"):
        ReportFolder("/proc/self/report")


def test_a_full_disk_keeps_the_old_file_and_leaves_no_partial_one(tmp_path):
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


def test_an_interrupted_write_leaves_no_partial_file(tmp_path, monkeypatch):
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
