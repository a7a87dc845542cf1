"""One run at a time in a folder, on any number of machines.

The file `lock` says who is running. On its own machine a run that was killed is told by its process number;
one of another machine, or container, by its silence: as long as it lives, a run touches its lock every BEAT
seconds. So a job that went down with its machine and is started on another one goes on there by itself.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cbam.errors import ConfigError, OutputError
from cbam.train.checkpoint import write
from cbam.train.folder import LOCK, clean

BEAT = 10.0  # seconds between two signs of life
_MARK = b'{"pid": '  # what a lock begins with
SILENCE = 60.0  # seconds without one after which a run of another machine is dead


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Make the folder if need be and keep every other run out of it; what a killed run left is cleaned.

    Raises:
        ConfigError: another run is in it, or a file of that name that is no lock. OutputError: it cannot be
            made or written to.
    """
    me = _me()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _refuse_other_file(folder / LOCK)
            _refuse_second(folder, say)
            write(folder / LOCK, json.dumps(me).encode())  # a full or read-only disk shows here
        clean(folder)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError.at(folder, error) from error
    over = threading.Event()
    threading.Thread(target=_beat, args=(folder / LOCK, over), daemon=True, name="lock").start()
    try:
        yield
    finally:
        over.set()
        if is_mine(folder):
            (folder / LOCK).unlink(missing_ok=True)


def is_mine(folder: Path) -> bool:
    """Whether this process holds the lock."""
    return _holder(folder) == _me()


def check_lock(folder: Path) -> None:
    """Refuse to write where another run has taken over.

    Raises:
        ConfigError: the lock is that of another process.
    """
    holder = _holder(folder)
    if holder and holder != _me():
        raise ConfigError(
            f"{folder} was taken over by process {holder.get('pid')} on {holder.get('host')}; this run ends"
        )


def _beat(lock: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(lock)


def _is_silent(lock: Path) -> bool:
    """Whether there is no sign of life for SILENCE seconds, by the clock of the disk alone."""
    first, deadline = _touched(lock), time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENCE / 10))
        if (now := _touched(lock)) != first:
            return now is None
    return True


def _touched(lock: Path) -> int | None:
    """When the lock was touched last. It is opened, for a network disk may answer stat() from memory."""
    try:
        with lock.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


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


def _refuse_other_file(lock: Path) -> None:
    """One of ours may be cut off where the machine went down."""
    with contextlib.suppress(FileNotFoundError):
        with lock.open("rb") as file:
            begins = file.read(len(_MARK))
        if not _MARK.startswith(begins):
            raise ConfigError(f"{lock} is of something else than a run: give another --out")


def _refuse_second(folder: Path, say: Callable[[str], None]) -> None:
    holder = _holder(folder)
    if holder and (holder.get("host"), holder.get("numbers")) != (socket.gethostname(), _numbers()):
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        say(f"{folder} was last used by {who}; looking for {SILENCE:g} s whether it is alive")
        if not _is_silent(folder / LOCK):
            raise ConfigError(f"{folder} is in use by {who}; give another --out")
        say(f"{who} is silent: its folder is taken over")
    elif holder and holder == _process(holder.get("pid")):
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
    return {
        "pid": pid, "host": socket.gethostname(), "numbers": _numbers(), "boot": boot, "started": started
    }  # fmt: skip


def _numbers() -> str:
    """What process numbers count in: a container has a space of them for itself (Linux)."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""
