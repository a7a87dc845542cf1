"""The folder of one training run: its settings, and its metrics, one JSON line each.

config.json    the settings in effect
metrics.jsonl  a line every few steps, and one per epoch
epochs.csv     a row per epoch, see loggers.py
nonfinite.json the images of a step whose loss was not finite
wandb-id       identifies the run to W&B
step-*.ckpt    checkpoints, see checkpoint.py; last.json names the newest
lock           the process that is running here, see lock.py
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cbam.errors import ConfigError, OutputError
from cbam.files import sync_folder
from cbam.train.checkpoint import LAST, checkpoints, write
from cbam.train.fault import fault
from cbam.train.recipes import RECIPES
from cbam.train.task import is_epoch

CONFIG, METRICS, TABLE, NONFINITE, LOCK, WANDB = (
    "config.json", "metrics.jsonl", "epochs.csv", "nonfinite.json", "lock", "wandb-id"
)  # fmt: skip
MOST_WAITING = 10_000  # lines of metrics held back while the disk cannot be written
WRITTEN = ("step-*.ckpt", LAST, CONFIG, METRICS, TABLE, NONFINITE, LOCK, WANDB)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the settings in effect as JSON, which is also YAML, so `--config` can read it.

    Raises:
        OutputError: it cannot be written.
    """
    _write_required(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def _write_required(path: Path, data: bytes) -> None:
    """Write a file that the run cannot do without."""
    try:
        write(path, data)
    except OSError as error:
        raise OutputError.at(path.parent, error) from error


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings in a folder's config.json; empty if it is missing or unreadable."""
    with contextlib.suppress(OSError, ValueError):
        settings = json.loads((folder / CONFIG).read_text("utf-8"))
        return settings if isinstance(settings, dict) else {}
    return {}


def check_free(folder: Path) -> None:
    """Refuse to start a run where it would overwrite files that do not belong to a run.

    A run that died before its first checkpoint may be overwritten.

    Raises:
        ConfigError: there are such files.
    """
    if checkpoints(folder) or _belongs_to_run(folder / CONFIG):
        return
    if foreign := [name for name in (CONFIG, METRICS, TABLE) if (folder / name).exists()]:
        raise ConfigError(
            f"{folder} holds files that are not from a run ({', '.join(foreign)}) and would be overwritten: "
            "give another --out"
        )


def _belongs_to_run(config: Path) -> bool:
    return settings_in(config.parent).get("recipe") in [*RECIPES]


def clean(folder: Path) -> None:
    """Delete the unfinished files of a killed run, and nothing else."""
    for name in WRITTEN:
        for part in folder.glob(f".{name}.part"):
            if not part.is_dir():
                part.unlink(missing_ok=True)


def epochs(folder: Path) -> list[dict[str, Any]]:
    """The metrics of every epoch in metrics.jsonl; a line cut off when the process died is left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / METRICS).read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict) and is_epoch(entry)]


def _encoded(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry) + "\n").encode()


class Metrics:
    """The lines of metrics.jsonl. If the disk cannot be written, one line says so and the run continues."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = folder / METRICS, say
        self._waiting: list[bytes] = []  # lines that could not be written yet

    def truncate(self, epoch: int, step: int, before: Sequence[dict[str, Any]] = ()) -> None:
        """Drop the lines after `step` steps of the whole run, within the unfinished `epoch`.

        A line cut off when the process died is dropped too. The epochs `before`, which are in the checkpoint,
        get their line back if it is missing: a run may continue in another folder.

        Raises:
            OutputError: the file cannot be written.
        """
        kept = [line for line in self._lines() if self._is_before(line, epoch, step)]
        present = {entry["epoch"] for entry in map(json.loads, kept) if is_epoch(entry)}
        missing = [_encoded(entry) for entry in before if entry["epoch"] not in present]
        _write_required(self._path, b"".join([*missing, *kept]))

    def _lines(self) -> list[bytes]:
        try:
            return self._path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []

    @staticmethod
    def _is_before(line: bytes, epoch: int, step: int) -> bool:
        try:
            entry = json.loads(line)
            over = entry["epoch"] < epoch if is_epoch(entry) else entry["step"] <= step
            return line.endswith(b"\n") and over
        except (ValueError, KeyError, TypeError):
            return False

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line, after those not yet written."""
        first = not self._waiting
        self._waiting = [*self._waiting, _encoded(entry)][-MOST_WAITING:]
        error = self._append()
        if error is not None and first:
            self._say(f"{self._path}: {error.strerror or error}; its lines wait until it can be written")

    def end(self) -> None:
        """Append the lines not yet written, or report that they are lost."""
        error = self._append() if self._waiting else None
        if error is not None:
            lost = f"{len(self._waiting)} of its lines are lost"
            self._say(f"{self._path}: {error.strerror or error}; {lost}")

    def _append(self) -> OSError | None:
        """Write all waiting lines, or none."""
        lines, before = b"".join(self._waiting), None
        middle = len(lines) - len(self._waiting[-1]) // 2
        try:
            with self._path.open("ab") as file:
                before = file.seek(0, os.SEEK_END)
                file.write(lines[:middle])
                file.flush()
                fault("log")
                file.write(lines[middle:])
        except OSError as error:
            with contextlib.suppress(OSError):
                if before is not None:
                    os.truncate(self._path, before)  # leave no partial line
            return error
        self._waiting = []
        return None

    def sync(self) -> None:
        """Sync the file to disk, so that no checkpoint is ahead of the metrics."""
        with contextlib.suppress(OSError), self._path.open("ab") as file:
            os.fsync(file.fileno())
            sync_folder(self._path.parent)
