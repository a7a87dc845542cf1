"""The folder of one training run: its lock, its settings, and its metrics, one JSON line each.

config.json    the settings as they came into effect
metrics.jsonl  a line every few steps, and one per epoch
step-*.ckpt    checkpoints, see checkpoint.py; last.json names the newest
lock           who is running here
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cbam.errors import ConfigError, OutputError
from cbam.files import sync_folder
from cbam.train.checkpoint import write
from cbam.train.fault import fault
from cbam.train.task import is_epoch

CONFIG, METRICS, LOCK = "config.json", "metrics.jsonl", "lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be and keep every other run out of it; what a killed run left is cleaned.

    Raises:
        ConfigError: another run is in it. OutputError: it cannot be made or written to.
    """
    me = _me()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _refuse_second(folder)
            write(folder / LOCK, json.dumps(me).encode())  # a full or read-only disk shows here
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        told = f"cannot write to {folder}: {error.strerror or error}; give another --out"
        raise OutputError(told) from error
    try:
        yield
    finally:
        if _holder(folder) == me:
            (folder / LOCK).unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time looks at the lock and takes it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network disk without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _refuse_second(folder: Path) -> None:
    holder = _holder(folder)
    if holder and holder.get("host") != socket.gethostname():
        raise ConfigError(
            f"{folder} is in use by process {holder.get('pid')} on {holder.get('host')}; "
            f"if that run is dead, delete {folder / LOCK}"
        )
    if holder and holder == _process(holder.get("pid")):
        raise ConfigError(f"{folder} is in use by process {holder['pid']}; give another --out")


def _holder(folder: Path) -> dict[str, Any]:
    try:
        holder = json.loads((folder / LOCK).read_text("utf-8"))
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}


def _me() -> dict[str, Any]:
    return _process(os.getpid())


def _process(pid: Any) -> dict[str, Any]:
    """What tells a living process from a later one of the same number; empty for one that is not there."""
    if type(pid) is not int:
        return {}
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return {}
    except PermissionError:
        pass
    boot = started = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, started = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0:20:19]
        if state == "Z":
            return {}
    return {"pid": pid, "host": socket.gethostname(), "boot": boot, "started": started}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the settings in effect as JSON, which is YAML too: `--config` reads it."""
    write(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def epochs(folder: Path) -> list[dict[str, Any]]:
    """The metrics of every epoch in metrics.jsonl; a line that was torn when the process died is left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / METRICS).read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict) and is_epoch(entry)]


class Metrics:
    """The lines of metrics.jsonl. A disk that takes no more ends the writing with one line, not the run."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._path, self._say, self._broken = folder / METRICS, say, False

    def cut(self, epoch: int, step: int) -> None:
        """Forget what came after `step` steps of the whole run, in which `epoch` was not over.

        A line that was torn when the process died is dropped with it.
        """
        kept = [line for line in self._lines() if self._is_before(line, epoch, step)]
        write(self._path, b"".join(kept))

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
        """Append a line."""
        if self._broken:
            return
        line = (json.dumps(entry) + "\n").encode()
        try:
            with self._path.open("ab") as file:
                file.write(line[: len(line) // 2])
                file.flush()
                fault("log")
                file.write(line[len(line) // 2 :])
        except OSError as error:
            self._broken = True
            self._say(f"{self._path}: {error.strerror or error}; training goes on without metrics")

    def sync(self) -> None:
        """Bring what was added onto the disk, so that no checkpoint is ahead of the metrics."""
        with contextlib.suppress(OSError), self._path.open("ab") as file:
            os.fsync(file.fileno())
            sync_folder(self._path.parent)
