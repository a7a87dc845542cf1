"""One run at a time in a folder (rows K16, K18, R21)."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from cbam.errors import ConfigError, OutputError
from cbam.train import lock
from cbam.train.lock import LOCK, _process, check_lock, locked


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    # K18, R21
    with locked(tmp_path / "run"):
        with (
            pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"),
            locked(tmp_path / "run"),
        ):
            pass
        assert (tmp_path / "run" / LOCK).exists()
    assert list((tmp_path / "run").iterdir()) == []


def dead() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


@pytest.mark.parametrize("what", ["dead", "another process of that number", "garbage", "empty"])
def test_the_lock_and_partial_files_of_a_killed_run_are_removed(tmp_path, what):
    # K18
    alive = _process(os.getpid())
    left = {
        "dead": json.dumps({**alive, "pid": dead()}),
        "another process of that number": json.dumps({**alive, "started": "1"}),
        "garbage": "{",
        "empty": "",
    }
    (tmp_path / LOCK).write_text(left[what])
    (tmp_path / ".step-00000003.ckpt.part").write_text("half")
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []


def of_another_machine(folder: Path) -> Path:
    (folder / LOCK).write_text(json.dumps({"pid": 1, "host": socket.gethostname() + "-2"}))
    return folder / LOCK


def of_another_container(folder: Path) -> Path:
    """With this host name, like copies of one image; its process ids mean nothing here."""
    (folder / LOCK).write_text(json.dumps({**_process(os.getpid()), "pid": dead(), "numbers": "pid:[1]"}))
    return folder / LOCK


@pytest.fixture
def _short_timeouts(monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(lock, "BEAT", 0.05)


@pytest.mark.usefixtures("_short_timeouts")
@pytest.mark.parametrize("of", [of_another_machine, of_another_container])
def test_a_live_run_on_another_machine_keeps_its_folder(tmp_path, of):
    # K18, R21
    theirs, over = of(tmp_path), threading.Event()
    pulse = threading.Thread(target=lock._heartbeat, args=(theirs, over))
    pulse.start()
    before, said = theirs.read_bytes(), []
    try:
        with pytest.raises(ConfigError, match="in use by process "), locked(tmp_path, said.append):
            pass
    finally:
        over.set()
        pulse.join()
    assert theirs.read_bytes() == before
    assert "whether it is alive" in said[0]


@pytest.mark.usefixtures("_short_timeouts")
def test_the_next_run_takes_over_the_folder_of_a_machine_that_went_down(tmp_path):
    # K18, R21: a job that was put back into the queue, and started on another machine
    said: list[str] = []
    of_another_machine(tmp_path)
    with locked(tmp_path, said.append):
        check_lock(tmp_path)
        assert _process(os.getpid()) == json.loads((tmp_path / LOCK).read_text())
    assert said[1] == f"no sign of life from process 1 on {socket.gethostname()}-2: taking over its folder"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_short_timeouts")
def test_a_lock_is_touched_while_its_run_lives(tmp_path):
    with locked(tmp_path):
        first = (tmp_path / LOCK).stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_run_that_lost_its_folder_ends_without_removing_the_new_lock(tmp_path):
    # R21
    with locked(tmp_path):
        theirs = of_another_machine(tmp_path)
        with pytest.raises(ConfigError, match=r"was taken over by process 1 on .*-2; this run ends"):
            check_lock(tmp_path)
    assert theirs.exists()


@pytest.mark.parametrize("folder", ["/proc/self/run", "file/run"])
def test_an_unwritable_folder_is_reported_before_any_work(folder, tmp_path, monkeypatch):
    # K16
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write to") as caught, locked(Path(folder)):
        pass
    assert caught.value.exit_code == 7


def test_only_partial_files_of_a_run_are_removed(tmp_path):
    # K14: a killed export leaves a folder
    (tmp_path / ".model.onnx.1a2b.part").mkdir()
    (tmp_path / ".last.json.part").mkdir()
    (tmp_path / ".big.iso.part").write_text("half of somebody's download")
    (tmp_path / ".metrics.jsonl.part").write_text("half")
    with locked(tmp_path):
        assert not (tmp_path / ".metrics.jsonl.part").exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".model.onnx.1a2b.part", ".last.json.part", ".big.iso.part"}


@pytest.mark.parametrize("content", [b"yarn lockfile v1", b'{"packages": []}', b"\xff\x00", b"[1]"])
def test_a_file_with_the_locks_name_that_is_not_a_lock_is_kept(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    refused = pytest.raises(ConfigError, match="lock is not from a run: give another --out")
    with refused, locked(tmp_path):
        pass
    assert (tmp_path / LOCK).read_bytes() == content
