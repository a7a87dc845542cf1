"""Loggers: what they are given, and that none of them ends a run (rows R14, R23)."""

import csv
import json
import sys
import types
from pathlib import Path

import pytest

from cbam.errors import StoppedError
from cbam.train import run
from cbam.train.folder import METRICS
from cbam.train.loggers import Loggers, ProgressLine


class Watch:
    every = 0.0

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    now = say

    def advance(self, share: float) -> None: ...

    def skip(self, share: float) -> None: ...


@pytest.fixture
def small():
    return {
        "limit": 20,
        "epochs": 2,
        "batch_size": 10,
        "log_every": 1,
        "device": "cpu",
        "model": "resnet_tiny",
    }


def test_a_run_leaves_a_table_of_epochs_and_tensorboard_events(tmp_path, small):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = Watch()
    history = run("digits", small, tmp_path / "run", watch)
    with (tmp_path / "run" / "epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in rows] == [entry["val_loss"] for entry in history]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"loss", "lr", "images_per_second", "wait_share", "val_top1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert any("images/s" in line and "of the time waiting for images" in line for line in watch.said)


class Broken:
    def __init__(self, *_, **__) -> None:
        self.calls = 0

    def log_metrics(self, metrics, step=None):
        raise ConnectionError("no network")

    def finalize(self, status): ...


def test_a_failing_logger_is_reported_once_and_does_not_end_the_run(tmp_path, small, monkeypatch):
    # R23
    fake = types.SimpleNamespace(WandbLogger=Broken)
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", fake)
    watch = Watch()
    history = run("digits", {**small, "loggers": ("wandb", "csv")}, tmp_path / "run", watch)
    assert len(history) == 2
    told = [line for line in watch.said if "wandb" in line]
    assert told == ["wandb: ConnectionError: no network; training continues without it"]
    assert (tmp_path / "run" / "epochs.csv").exists()


def test_a_second_signal_during_a_logger_call_ends_the_run_at_once(tmp_path):
    # R17, R18
    class Slow(Broken):
        def log_metrics(self, metrics, step=None):
            raise StoppedError("stopped at once by a second signal", 143)

    said: list[str] = []
    loggers = Loggers((), tmp_path, {}, said.append)
    loggers.put("slow", Slow())
    with pytest.raises(StoppedError, match="at once"):
        loggers.add({"loss": 1.0}, 1)
    assert said == []


def test_a_resumed_run_keeps_its_unique_wandb_id(tmp_path, small, monkeypatch):
    # R23
    ids = []

    class Fake:
        def __init__(self, *, id, **_) -> None:
            ids.append(id)

        def log_metrics(self, metrics, step=None): ...

        def finalize(self, status): ...

    fake = types.SimpleNamespace(WandbLogger=Fake)
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", fake)
    settings = {**small, "loggers": ("wandb",), "epochs": 1}
    one, other = (tmp_path / user / "runs" / "mine" for user in ("a", "b"))
    for folder, resume in ((one, None), (other, None), (one, "auto")):
        run("digits", {} if resume else settings, folder, Watch(), resume=resume)
    assert ids[0] == ids[2] != ids[1]
    for path in [*one.glob("step-*.ckpt")]:
        path.unlink()
    run("digits", settings, one, Watch())  # another run, in the folder of one that left no checkpoint
    assert ids[3] not in ids[:3]


def test_a_logger_that_is_not_installed_is_reported_at_the_start(tmp_path):
    # R23
    said: list[str] = []
    loggers = Loggers(("mlflow",), tmp_path, {}, said.append)
    assert len(said) == 1
    assert said[0].startswith("mlflow: ModuleNotFoundError")
    loggers.add({"loss": 1.0}, 1)
    loggers.close()
    assert len(said) == 1


def test_a_table_missed_on_a_full_disk_is_written_at_the_end(tmp_path):
    # R14
    said: list[str] = []
    (tmp_path / METRICS).write_text(json.dumps({"epoch": 0, "train_loss": 1.0}) + "\n")
    part = tmp_path / ".epochs.csv.part"
    part.symlink_to("/dev/full")
    loggers = Loggers(("csv",), tmp_path, {}, said.append)
    loggers.add({"train_loss": 1.0}, 1)
    part.unlink(missing_ok=True)
    loggers.close()
    assert said == []
    assert (tmp_path / "epochs.csv").read_text() == "epoch,train_loss\n0,1.0\n"


def test_a_full_disk_stops_the_table_and_not_the_run(tmp_path):
    # R14
    said: list[str] = []
    (tmp_path / METRICS).write_text(json.dumps({"epoch": 0, "train_loss": 1.0}) + "\n")
    part = tmp_path / ".epochs.csv.part"
    loggers = Loggers(("csv",), tmp_path, {}, said.append)
    for act in (lambda: loggers.add({"train_loss": 1.0}, 1), loggers.close):
        part.unlink(missing_ok=True)
        part.symlink_to("/dev/full")
        act()
    assert len(said) == 1
    assert "No space left" in said[0]


def test_the_progress_line_is_rate_limited():
    said: list[str] = []
    line = ProgressLine(said.append, 9, every=1000.0)
    for step in range(3):
        line.log_metrics({"epoch": 2, "loss": 0.5, "images_per_second": 12.3, "wait_share": 0.04}, step)
    assert said == ["epoch 2 of 9, step 0: loss 0.5000, 12 images/s, 4 % of the time waiting for images"]


def test_resuming_restores_the_table_of_epochs(tmp_path, small):
    # R22
    run("digits", {**small, "loggers": ("csv",)}, tmp_path / "run", Watch())
    table = Path(tmp_path / "run" / "epochs.csv")
    before = table.read_bytes()
    table.write_text("torn")
    run("digits", {}, tmp_path / "run", Watch(), resume="auto")
    assert table.read_bytes() == before
