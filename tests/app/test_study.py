"""`cbam study` on the command line."""

import pytest

from cbam.app import cli
from cbam.studies.tables import STUDIES

TINY = ["--epochs", "1", "--limit", "20", "--batch-size", "16", "--device", "cpu", "--seeds", "1"]


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["chanel"], 2, "unknown study 'chanel'; did you mean 'channel'?"),
        (["channel", "--sed", "3"], 2, "unknown option --sed; did you mean --seeds?"),
        (["channel", "--seeds", "0"], 2, "must be a whole number above 0"),
        (["channel", "--budget", "soon"], 2, "must be a time such as 90m"),
        (["channel", "--precision", "fp8"], 2, "precision must be one of fp32, bf16"),
        (["channel", "--dataset", "nowhere"], 3, "nowhere: no such folder"),
        (["order", "start", "--arms", "se"], 2, "study start has no row se"),
        (["order", "--plan", "--tables"], 2, "--tables: not allowed with argument --plan"),
    ],
)
def test_bad_input_is_one_line_and_its_exit_code(tmp_path, capsys, arguments, code, told):
    # C1, C6, C12
    assert cli.main(["study", *arguments]) == code
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_a_name_it_lists_the_studies_and_their_rows(capsys):
    assert cli.main(["study"]) == 0
    printed = capsys.readouterr().out
    assert all(study.title in printed for study in STUDIES.values())
    assert "se, channel-spatial, spatial-channel, parallel" in printed


def test_a_plan_writes_nothing(tmp_path, capsys):
    assert cli.main(["study", "channel", "--plan", *TINY, "--arms", "plain"]) == 0
    assert "0 of 1 runs have a record" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_records_is_reported(tmp_path, capsys):
    assert cli.main(["study", "channel", "order", "--tables", "--out", "nowhere"]) == 0
    told = capsys.readouterr().out
    assert all(f"No record of {name} in nowhere/{name}" in told for name in ("channel", "order"))
    assert list(tmp_path.iterdir()) == []


def test_a_study_ends_with_its_tables_and_with_75_where_the_time_was_over(tmp_path, capsys):
    command = ["study", "channel", *TINY, "--arms", "plain"]
    assert cli.main([*command, "--budget", "0s"]) == 75
    assert "1 run still without a record; repeat the command to continue" in capsys.readouterr().err
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "Channel attention with average pooling, max pooling, or both: resnet_tiny on digits" in printed
    assert "Partial: 0 of 4 rows" in printed
    assert len(list((tmp_path / "results" / "channel").glob("*.json"))) == 1
    (page,) = (tmp_path / "results" / "channel").glob("*.md")
    page.unlink()
    assert cli.main(["study", "channel", "--tables"]) == 0
    assert page.exists()


def test_a_study_that_is_named_twice_is_filled_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["study", "channel", "channel", *TINY, "--arms", "plain"]
    assert cli.main([*command, "--budget", "0s"]) == 75
    assert "1 run still without a record" in capsys.readouterr().err
