"""What a run's folder keeps: metrics that match the checkpoint (rows R14, R22)."""

import errno
import json
import resource
from pathlib import Path

import pytest

from cbam.errors import OutputError
from cbam.train.folder import CONFIG, METRICS, Metrics, write_config


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_metrics_are_truncated_to_the_checkpoint_and_a_torn_line_is_dropped(tmp_path):
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
    metrics.truncate(1, 6)
    assert lines(tmp_path) == whole
    metrics.truncate(1, 4)
    assert lines(tmp_path) == whole[:3]
    metrics.truncate(0, 3)  # after the last step of epoch 0, before its validation
    assert lines(tmp_path) == whole[:1]
    metrics.truncate(0, -1)
    assert lines(tmp_path) == []


def test_metrics_missed_on_a_full_disk_are_written_once_there_is_room(tmp_path):
    # R14, R23, K13
    said: list[str] = []
    metrics = Metrics(tmp_path, said.append)
    entries = [{"epoch": 0, "step": step, "loss": 0.5} for step in range(4)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics.add(entries[0])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / METRICS).stat().st_size + 7, limits[1]))
        metrics.add(entries[1])
        metrics.add(entries[2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lines(tmp_path) == entries[:1]  # and nothing torn after it
    metrics.add(entries[3])
    assert lines(tmp_path) == entries
    assert len(said) == 1


def test_a_full_disk_before_the_first_step_raises_an_output_error(tmp_path):
    # K16
    metrics = Metrics(tmp_path, print)
    for name, begin in (
        (CONFIG, lambda: write_config(tmp_path, {})),
        (METRICS, lambda: metrics.truncate(1, 2, [{"epoch": 0, "train_loss": 1.0}])),
    ):
        (tmp_path / f".{name}.part").symlink_to("/dev/full")
        with pytest.raises(OutputError, match=rf"cannot write to {tmp_path}: No space left.*another --out"):
            begin()
        assert not [*tmp_path.iterdir()]


def too_many(*_, **__):
    raise OSError(errno.EMFILE, "Too many open files")


def test_no_line_is_lost_while_the_metrics_file_cannot_be_opened(tmp_path, monkeypatch):
    # R14
    metrics = Metrics(tmp_path, lambda _: None)
    entries = [{"epoch": 0, "step": step, "loss": 0.5} for step in range(3)]
    metrics.add(entries[0])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", too_many)
        metrics.add(entries[1])
        metrics.add(entries[2])
    assert lines(tmp_path) == entries[:1]
    metrics.end()
    assert lines(tmp_path) == entries


def test_unwritable_metrics_are_reported_once_and_do_not_end_the_run(tmp_path):
    # R14, R23
    said: list[str] = []
    (tmp_path / METRICS).symlink_to("/dev/full")
    metrics = Metrics(tmp_path, said.append)
    for step in range(3):
        metrics.add({"epoch": 0, "step": step})
    metrics.sync()
    assert len(said) == 1
    assert "its lines wait until it can be written" in said[0]
    metrics.end()
    assert said[1].endswith("3 of its lines are lost")
