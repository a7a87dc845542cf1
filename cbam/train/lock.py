"""One run at a time in a folder, on any number of machines.

The file `lock` names the running process. On the same machine, the process id shows whether that run was
killed; on another machine or in a container, silence does: a live run touches its lock every BEAT seconds.
So a job that went down with its machine can continue on another one without help.
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
_MARK = b'{"pid": '  # how a lock file starts
SILENCE = 60.0  # seconds without one after which a run on another machine counts as dead


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Create the folder if needed, keep other runs out of it, and clean up after a killed one.

    Raises:
        ConfigError: another run is using it, or its file `lock` is not ours. OutputError: it cannot be
            created or written to.
    """
    me = _this_process()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder):
            _refuse_other_file(folder / LOCK)
            _refuse_other_run(folder, say)
            write(folder / LOCK, json.dumps(me).encode())  # fails on a full or read-only disk
        clean(folder)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError.at(folder, error) from error
    over = threading.Event()
    threading.Thread(target=_heartbeat, args=(folder / LOCK, over), daemon=True, name="lock").start()
    try:
        yield
    finally:
        over.set()
        if is_mine(folder):
            (folder / LOCK).unlink(missing_ok=True)


def is_mine(folder: Path) -> bool:
    """Whether this process holds the lock."""
    return _holder(folder) == _this_process()


def check_lock(folder: Path) -> None:
    """Refuse to write if another run has taken over the folder.

    Raises:
        ConfigError: the lock belongs to another process.
    """
    holder = _holder(folder)
    if holder and holder != _this_process():
        raise ConfigError(
            f"{folder} was taken over by process {holder.get('pid')} on {holder.get('host')}; this run ends"
        )


def _heartbeat(lock: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(lock)


def _is_silent(lock: Path) -> bool:
    """Whether the lock stays untouched for SILENCE seconds. Compares its own times only, not our clock."""
    first, deadline = _touched(lock), time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENCE / 10))
        if (now := _touched(lock)) != first:
            return now is None
    return True


def _touched(lock: Path) -> int | None:
    """When the lock was last touched. The file is opened, as a network disk may cache results of stat()."""
    try:
        with lock.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let only one process at a time read the lock and take it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network disk may have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _refuse_other_file(lock: Path) -> None:
    """Refuse a file that is not our lock, which may be cut off if the machine went down."""
    with contextlib.suppress(FileNotFoundError):
        with lock.open("rb") as file:
            begins = file.read(len(_MARK))
        if not _MARK.startswith(begins):
            raise ConfigError(f"{lock} is not from a run: give another --out")


def _refuse_other_run(folder: Path, say: Callable[[str], None]) -> None:
    holder = _holder(folder)
    if holder and (holder.get("host"), holder.get("numbers")) != (socket.gethostname(), _numbers()):
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        say(f"{folder} was last used by {who}; waiting {SILENCE:g} s to see whether it is alive")
        if not _is_silent(folder / LOCK):
            raise ConfigError(f"{folder} is in use by {who}; give another --out")
        say(f"no sign of life from {who}: taking over its folder")
    elif holder and holder == _process(holder.get("pid")):
        raise ConfigError(f"{folder} is in use by process {holder['pid']}; give another --out")


def _holder(folder: Path) -> dict[str, Any]:
    try:
        holder = json.loads((folder / LOCK).read_text("utf-8"))
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}


def _this_process() -> dict[str, Any]:
    return _process(os.getpid())


def _process(pid: Any) -> dict[str, Any]:
    """What tells a process from a later one with the same id; empty if it is not running."""
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
    """The namespace of process ids: each container has its own (Linux)."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""
