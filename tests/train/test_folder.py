"""A run's folder: one run at a time, metrics that fit the checkpoint (rows K16, K18, R14, R21, R22)."""

import json
import os
import socket
from pathlib import Path

import pytest

from cbam.errors import ConfigError, OutputError
from cbam.train.folder import LOCK, METRICS, Metrics, _process, locked


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
def test_the_lock_and_the_pieces_of_a_killed_run_are_cleaned(tmp_path, what):
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


def test_a_lock_of_another_machine_is_left_to_the_user(tmp_path):
    # K18
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": socket.gethostname() + "-2"}))
    with pytest.raises(ConfigError, match="if that run is dead, delete"), locked(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize("folder", ["/proc/self/run", "file/run"])
def test_a_folder_that_cannot_be_written_is_told_before_any_work(folder, tmp_path, monkeypatch):
    # K16
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write to") as caught, locked(Path(folder)):
        pass
    assert caught.value.exit_code == 7


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_metrics_are_cut_to_the_checkpoint_and_a_torn_line_goes(tmp_path):
    # R22
    metrics = Metrics(tmp_path, print)
    for entry in (
        {"epoch": 0, "step": 2, "loss": 0.1},
        {"epoch": 0, "step": 3, "train_loss": 1.0},
        {"epoch": 1, "step": 4, "loss": 0.3},
        {"epoch": 1, "step": 6, "loss": 0.4},
    ):
        metrics.add(entry)
    whole = lines(tmp_path)
    (tmp_path / METRICS).write_bytes((tmp_path / METRICS).read_bytes() + b'{"epoch": 1, "st')
    metrics.cut(1, 6)
    assert lines(tmp_path) == whole
    metrics.cut(1, 4)
    assert lines(tmp_path) == whole[:3]
    metrics.cut(0, 3)  # after the last step of epoch 0, before its validation
    assert lines(tmp_path) == whole[:1]
    metrics.cut(0, -1)
    assert lines(tmp_path) == []


def test_metrics_that_cannot_be_written_are_one_line_and_not_the_end(tmp_path):
    # R14, R23
    said: list[str] = []
    (tmp_path / METRICS).symlink_to("/dev/full")
    metrics = Metrics(tmp_path, said.append)
    for step in range(3):
        metrics.add({"epoch": 0, "step": step})
    metrics.sync()
    assert len(said) == 1
    assert "training goes on without metrics" in said[0]
