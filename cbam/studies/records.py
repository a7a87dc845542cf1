"""The records of a study's runs: one JSON file per run, written once and never changed.

results/<study>/<data>-<row>-s<seed>-<settings>.json   a run of a clean commit
results/<study>/<...>.dirty-<source>.json               a run of modified code; never counted
results/<study>/.claims/                                locks of the runs in progress; absent otherwise
results/<study>/.unfinished/<run>/                      checkpoints of a long run, until it has a record
results/<study>/.unfinished/<run>.<digest>/             the same, written by another state of the code
results/<study>/.unfinished/fork-<settings>/            the same, of the network that forked runs start from
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cbam.errors import DataError, OutputError
from cbam.files import sync_folder
from cbam.studies.study import explicit, run_key

SCHEMA = 1
CLAIMS, UNFINISHED = ".claims", ".unfinished"
_REQUIRED: dict[str, Any] = {
    "schema": int, "study": str, "arm": str, "status": str, "config": dict, "data": dict, "epochs": list,
    "commit": str | None, "dirty": bool,
}  # fmt: skip


class Records:
    """The records of one study, in one folder.

    Raises:
        OutputError: the folder cannot be created or written to.
    """

    def __init__(self, root: str | os.PathLike, study: str) -> None:
        self.root, self.path = Path(root), Path(root) / study

    def all(self) -> dict[str, dict[str, Any]]:
        """Every record by file name, sorted.

        Raises:
            DataError: a file is not a record.
        """
        if not self.path.is_dir():
            return {}
        return {path.name: read(path) for path in sorted(self.path.glob("*.json"))}

    def has(self, name: str) -> bool:
        """Whether a record of that name exists."""
        return (self.path / f"{name}.json").exists()

    def add(self, name: str, record: dict[str, Any]) -> bool:
        """Write a record atomically; False if one exists already, which is kept."""
        text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        return self._create(name, text.encode())

    def unfinished(self, name: str) -> Path:
        """The folder for the checkpoints of a run that has no record yet."""
        return self.path / UNFINISHED / name

    def has_unfinished(self, name: str) -> bool:
        """Whether a run has checkpoints, of this or another state of the code."""
        kept = self.unfinished(name)
        return kept.exists() or any(kept.parent.glob(f"{name}.*"))

    def forget(self, name: str, *, others: bool) -> None:
        """Remove the checkpoints of a run; with `others` also those of other states of the code."""
        kept = self.unfinished(name)
        for folder in (kept, *(kept.parent.glob(f"{name}.*") if others else ())):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            (self.path / UNFINISHED).rmdir()

    def find_elsewhere(self, config: dict[str, Any], about: dict[str, Any]) -> Path | None:
        """A record of another study under the same root with the same settings and images, if any.

        Args:
            about: what identifies the images, as in a record's "data".
        """
        ending = f"-s{config['seed']}-{run_key(config)}.json"
        for path in sorted(self.root.glob(f"*/*{ending}")):
            if path.parent == self.path:
                continue
            record = read(path)
            same = explicit(record["config"]) == explicit(config) and same_images(record["data"], about)
            if same and counts(record):
                return path
        return None

    def reuse(self, name: str, config: dict[str, Any], about: dict[str, Any]) -> Path | None:
        """Copy the record that `find_elsewhere` finds; returns the path of the original."""
        path = self.find_elsewhere(config, about)
        if path is not None:
            self._create(name, path.read_bytes())
        return path

    def _create(self, name: str, data: bytes) -> bool:
        """Create a record complete or not at all, never replacing one: by a hard link, not a rename.

        Where hard links are not supported, as on some mounted drives, only the claim keeps others away.
        """
        target = self.path / f"{name}.json"
        with self._temporary(target.name, data) as part:
            try:
                os.link(part, target)
            except FileExistsError:
                return False
            except OSError:
                if target.exists():
                    return False
                part.rename(target)
        return True

    def compute(self, make: Callable[[list[dict[str, Any]]], dict[str, str]]) -> list[Path]:
        """Write the files that `make` computes from the records (name -> text), one process at a time."""
        with self.claimed("tables", wait=True):
            made = make(list(self.all().values()))
            for name, text in made.items():
                with self._temporary(name, text.encode()) as part:
                    part.replace(self.path / name)
        return [self.path / name for name in made]

    @contextlib.contextmanager
    def _temporary(self, name: str, data: bytes) -> Iterator[Path]:
        """A temporary file of this process with these bytes, synced to disk; removed after the block."""
        part = self.path / f".{name}.{os.getpid()}.part"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield part
            sync_folder(self.path)
        except OSError as error:
            raise OutputError.at(self.path, error) from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def claimed(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Claim a run for this process; yields False if another process holds it.

        The claim is a file lock, which the system releases however the process ends.

        Args:
            wait: until the claim is free.
        """
        try:
            import fcntl
        except ImportError:  # Windows: one process at a time
            yield True
            return
        claim = self.path / CLAIMS / name
        handle = None
        try:
            while True:
                handle = _open_lock(claim)
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = _still_at(handle, claim)
                if mine or not wait:
                    break
                os.close(handle)
        except BlockingIOError:
            mine = False
        except OSError as error:
            raise OutputError.at(self.path, error) from error
        try:
            yield mine
        finally:
            if mine:
                claim.unlink(missing_ok=True)
            if handle is not None:
                os.close(handle)
            for folder in (claim.parent, self.path):
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()


def _open_lock(claim: Path) -> int:
    """Open the file to lock; retries if a process that finishes removes the empty folders meanwhile."""
    tries = 100
    while True:
        try:
            claim.parent.mkdir(parents=True, exist_ok=True)
            return os.open(claim, os.O_CREAT | os.O_RDWR, 0o644)
        except (FileNotFoundError, FileExistsError):
            tries -= 1
            if not tries:
                raise


def _still_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`; a process that finished may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def read(path: Path) -> dict[str, Any]:
    """Read and check a record.

    Raises:
        DataError: not a record, or of a newer version.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a record of a run: {error}; move it away") from error
    absent = (
        [name for name in _REQUIRED if name not in record] if isinstance(record, dict) else list(_REQUIRED)
    )
    if absent:
        raise DataError(f"{path}: not a record of a run, it lacks {', '.join(absent)}; move it away")
    if invalid := _invalid(record):
        raise DataError(f"{path}: not a record of a run, its {invalid} is not valid; move it away")
    if record["schema"] > SCHEMA:
        raise DataError(f"{path}: written by a newer cbam (format {record['schema']}); upgrade cbam")
    return record


def _invalid(record: dict[str, Any]) -> str:
    """The first field of a record that tables cannot be computed from; "" if all are valid."""
    for name, kind in _REQUIRED.items():
        if not isinstance(record[name], kind) or (kind is int and isinstance(record[name], bool)):
            return name
    for name in ("data", "seed"):
        if name not in record["config"]:
            return "config"
    if record["status"] == "complete":
        entries = record["epochs"]
        if not entries or not all(isinstance(entry, dict) for entry in entries):
            return "epochs"
        numbers = [v for entry in entries for name, v in entry.items() if name != "epoch" and v is not None]
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
            return "epochs"
        if not isinstance(record.get("parameters"), int) or not isinstance(record.get("device"), dict):
            return "parameters or device"
    return ""


def same_images(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the "data" of two records are of the same images; older ones lack "files" and "objects"."""
    keys = ("train", "val", "sha256", *({"files", "objects"} & one.keys() & other.keys()))
    return all(one.get(key) == other.get(key) for key in keys)


def counts(record: dict[str, Any]) -> bool:
    """Whether a record may enter a table: finished, and of a known commit without modifications."""
    return record["status"] == "complete" and record["commit"] is not None and record["dirty"] is False
