"""Records are written once and whole, and found by their settings; claims end with their process."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import cbam
from cbam.errors import DataError, OutputError
from cbam.studies.records import Records, counts, read

ROOT = Path(cbam.__file__).parents[1]
RECORD = {
    "schema": 1, "study": "channel", "arm": "plain", "status": "complete",
    "config": {"seed": 0, "lr": 0.1, "data": "d"}, "data": {"train": 8, "val": 4, "sha256": "x"},
    "epochs": [{"epoch": 0, "val_top1": 9.5, "val_top5": None}],
    "commit": "abc", "dirty": False, "parameters": 9, "device": {"name": "cpu"},
}  # fmt: skip


def test_a_record_is_never_overwritten(tmp_path):
    records = Records(tmp_path, "channel")
    assert records.add("a", RECORD)
    assert not records.add("a", RECORD | {"commit": "def"})
    assert records.all() == {"a.json": RECORD}
    assert sorted(path.name for path in records.path.iterdir()) == ["a.json"]


def test_a_record_is_written_on_a_file_system_without_links(tmp_path, monkeypatch):
    def link(*names):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    test_a_record_is_never_overwritten(tmp_path)


def test_a_record_that_is_not_valid_json_leaves_nothing(tmp_path):
    records = Records(tmp_path, "channel")
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.add("a", RECORD | {"seconds": float("nan")})
    assert not records.path.exists()


def test_an_unwritable_folder_is_named():
    # K16; root may write anywhere but here
    with pytest.raises(OutputError, match="give another --out"):
        Records("/proc/self", "channel").add("a", RECORD)


def test_a_run_of_the_same_settings_is_reused_byte_for_byte_by_another_study(tmp_path):
    one, other = Records(tmp_path, "channel"), Records(tmp_path, "order")
    from cbam.studies.study import run_key

    config = RECORD["config"]
    name = f"digits-avg-s0-{run_key(config)}"
    one.add(name, RECORD)
    taken = other.reuse(name.replace("avg", "se"), config, RECORD["data"])
    assert taken == one.path / f"{name}.json"
    assert (other.path / f"{name.replace('avg', 'se')}.json").read_bytes() == taken.read_bytes()
    assert other.reuse("x", {"seed": 1, "lr": 0.1}, RECORD["data"]) is None


@pytest.mark.parametrize(
    "change", [{"train": 9}, {"val": 5}, {"sha256": "y"}, {"files": "b"}, {"objects": "b"}]
)
def test_a_run_on_other_images_is_not_reused(tmp_path, change):
    from cbam.studies.study import run_key

    about = RECORD["data"] | {"files": "a", "objects": "a"}
    name = f"digits-avg-s0-{run_key(RECORD['config'])}"
    Records(tmp_path, "channel").add(name, RECORD | {"data": about})
    assert Records(tmp_path, "order").reuse("x", RECORD["config"], about | change) is None
    assert Records(tmp_path, "order").reuse("x", RECORD["config"], RECORD["data"])  # as from an older cbam


@pytest.mark.parametrize("change", [{"dirty": True}, {"status": "NonFiniteError: nan"}, {"commit": None}])
def test_a_record_that_does_not_count_is_not_reused(tmp_path, change):
    from cbam.studies.study import run_key

    record = RECORD | change
    assert not counts(record)
    Records(tmp_path, "channel").add(f"digits-avg-s0-{run_key(RECORD['config'])}", record)
    assert Records(tmp_path, "order").reuse("x", RECORD["config"], RECORD["data"]) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "not a record"), ("[]", "lacks schema"), ("{}", "lacks schema"), ("\xff", "not a")],
)
def test_a_file_that_is_not_a_record_is_named(tmp_path, text, told):
    (tmp_path / "channel").mkdir()
    (tmp_path / "channel" / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=told) as caught:
        Records(tmp_path, "channel").all()
    assert "a.json" in str(caught.value)


def test_a_record_of_a_newer_version_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORD | {"schema": 2}))
    with pytest.raises(DataError, match="newer cbam"):
        read(tmp_path / "a.json")


def test_a_run_is_claimed_by_one_process_and_its_claim_leaves_no_file(tmp_path):
    records = Records(tmp_path, "channel")
    with records.claimed("a") as mine, records.claimed("b") as too:
        assert mine
        assert too
        for _ in range(2):  # a refused attempt does not remove the claim
            with records.claimed("a") as again:
                assert not again
    assert list(tmp_path.iterdir()) == []
    with records.claimed("a") as mine:
        assert mine


def test_folders_that_another_process_removes_are_created_again(tmp_path, monkeypatch):
    opened, really = [], os.open

    def taken_away(path, *how):
        opened.append(path)
        if len(opened) < 3:
            for folder in Path(path).parents[:2]:
                folder.rmdir()
        return really(path, *how)

    monkeypatch.setattr(os, "open", taken_away)
    with Records(tmp_path, "channel").claimed("a") as mine:
        assert mine
    assert len(opened) == 3


def test_a_process_that_waited_for_a_claim_holds_it_exclusively(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    records, waiting, flock, had = Records(tmp_path, "channel"), threading.Event(), fcntl.flock, []

    def noted(handle, how):
        if not how & fcntl.LOCK_NB:
            waiting.set()
        flock(handle, how)

    def wait():
        with records.claimed("a", wait=True) as mine, records.claimed("a") as another:
            had.append((mine, another))

    monkeypatch.setattr(fcntl, "flock", noted)
    thread = threading.Thread(target=wait)
    with records.claimed("a"):
        thread.start()
        assert waiting.wait(10)
        time.sleep(0.05)  # so that it waits for the file that is about to be removed
    thread.join(10)
    assert had == [(True, False)]


HOLD = """
import sys, time
from cbam.studies.records import Records
with Records(sys.argv[1], "channel").claimed("a") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_killed_process_releases_its_claim(tmp_path):
    # R18
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with Records(tmp_path, "channel").claimed("a") as mine:
            assert not mine
        other.send_signal(signal.SIGKILL)
        other.wait(10)
    began = time.monotonic()
    with Records(tmp_path, "channel").claimed("a") as mine:
        assert mine
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("schema", "1"), ("schema", True), ("study", None), ("config", []), ("config", {}), ("data", None),
        ("epochs", []), ("epochs", {}), ("epochs", [1]), ("epochs", [{"val_top1": "9.5"}]), ("commit", 1),
        ("epochs", [{"val_top1": float("nan")}]), ("dirty", "no"), ("parameters", None), ("device", None),
    ],
)  # fmt: skip
def test_an_invalid_record_is_named_and_refused(tmp_path, part, value):
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(RECORD | {part: value}))
    with pytest.raises(
        DataError, match=rf"edited.json: not a record of a run, its .*{part}.* is not valid; move"
    ):
        read(path)
    path.write_text(json.dumps(RECORD))
    assert read(path) == RECORD
