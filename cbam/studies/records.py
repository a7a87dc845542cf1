"""The records of a study's runs: one JSON file per run, written once and never again.

results/<study>/<data>-<row>-s<seed>-<settings>.json   a run of a clean commit
results/<study>/<...>.dirty-<source>.json               a run of changed code; never counted
results/<study>/.claims/                                who is at which run; not there when nobody is
results/<study>/.unfinished/<run>/                      checkpoints of a long run, until it has a record
results/<study>/.unfinished/<run>.<digest>/             those made by another state of the code, likewise
results/<study>/.unfinished/fork-<settings>/            those of a network that forks begin with, likewise
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
from cbam.studies.study import run_key, said

SCHEMA = 1
CLAIMS, UNFINISHED = ".claims", ".unfinished"
_NEEDED: dict[str, Any] = {
    "schema": int, "study": str, "arm": str, "status": str, "config": dict, "data": dict, "epochs": list,
    "commit": str | None, "dirty": bool,
}  # fmt: skip


class Records:
    """The records in one folder, of one study.

    Raises:
        OutputError: the folder cannot be made or written to.
    """

    def __init__(self, root: str | os.PathLike, study: str) -> None:
        self.root, self.path = Path(root), Path(root) / study

    def all(self) -> dict[str, dict[str, Any]]:
        """Every record by the name of its file, in order.

        Raises:
            DataError: a file that is no record.
        """
        if not self.path.is_dir():
            return {}
        return {path.name: read(path) for path in sorted(self.path.glob("*.json"))}

    def has(self, name: str) -> bool:
        """Whether there is a record of that name."""
        return (self.path / f"{name}.json").exists()

    def add(self, name: str, record: dict[str, Any]) -> bool:
        """Write a record, whole or not at all; false where there is one already, which stays."""
        text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        return self._place(name, text.encode())

    def unfinished(self, name: str) -> Path:
        """The folder for what a run without a record has saved."""
        return self.path / UNFINISHED / name

    def has_unfinished(self, name: str) -> bool:
        """Whether a run has saved anything, by whatever code."""
        kept = self.unfinished(name)
        return kept.exists() or any(kept.parent.glob(f"{name}.*"))

    def forget(self, name: str, *, others: bool) -> None:
        """Remove what a run had saved while it had no record; and what `others`, by other code, had of it."""
        kept = self.unfinished(name)
        for folder in (kept, *(kept.parent.glob(f"{name}.*") if others else ())):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # there are others
            (self.path / UNFINISHED).rmdir()

    def elsewhere(self, config: dict[str, Any], about: dict[str, Any]) -> Path | None:
        """The record of the same settings and images in another study beside this one, if any.

        Args:
            about: what tells the images from others, as records have it under "data".
        """
        ending = f"-s{config['seed']}-{run_key(config)}.json"
        for path in sorted(self.root.glob(f"*/*{ending}")):
            if path.parent == self.path:
                continue
            record = read(path)
            same = said(record["config"]) == said(config) and same_pictures(record["data"], about)
            if same and counts(record):
                return path
        return None

    def take_over(self, name: str, config: dict[str, Any], about: dict[str, Any]) -> Path | None:
        """Copy the record that there is `elsewhere`; where it came from."""
        path = self.elsewhere(config, about)
        if path is not None:
            self._place(name, path.read_bytes())
        return path

    def _place(self, name: str, data: bytes) -> bool:
        """A name that appears with all its bytes, and is never taken from another: link, not rename.

        Where there are no links, as on a mounted drive, what keeps others away is the claim alone.
        """
        target = self.path / f"{name}.json"
        with self._written(target.name, data) as part:
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
        """Write the files that `make` computes from the records: name -> text. One process at a time."""
        with self.claimed("tables", wait=True):
            made = make(list(self.all().values()))
            for name, text in made.items():
                with self._written(name, text.encode()) as part:
                    part.replace(self.path / name)
        return [self.path / name for name in made]

    @contextlib.contextmanager
    def _written(self, name: str, data: bytes) -> Iterator[Path]:
        """A file of this process alone with these bytes on the disk, gone after the block."""
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
        """Take a run for this process; false where another process is at it.

        The claim is a lock of the system on a file, so it ends with the process however that ends.

        Args:
            wait: until nobody is at it.
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
                handle = _opened(claim)
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = _is_at(handle, claim)
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


def _opened(claim: Path) -> int:
    """The file to lock. A process that ends takes empty folders away, these perhaps: they are made again."""
    tries = 100
    while True:
        try:
            claim.parent.mkdir(parents=True, exist_ok=True)
            return os.open(claim, os.O_CREAT | os.O_RDWR, 0o644)
        except (FileNotFoundError, FileExistsError):
            tries -= 1
            if not tries:
                raise


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`: another process may have ended and removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        DataError: not one, or of a newer version.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a record of a run: {error}; move it away") from error
    absent = [name for name in _NEEDED if name not in record] if isinstance(record, dict) else list(_NEEDED)
    if absent:
        raise DataError(f"{path}: not a record of a run, it lacks {', '.join(absent)}; move it away")
    if wrong := _wrong(record):
        raise DataError(f"{path}: not a record of a run, its {wrong} is not valid; move it away")
    if record["schema"] > SCHEMA:
        raise DataError(f"{path}: written by a newer cbam (format {record['schema']}); upgrade cbam")
    return record


def _wrong(record: dict[str, Any]) -> str:
    """The first part of a record that tables cannot be computed from; empty where there is none."""
    for name, kind in _NEEDED.items():
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


def same_pictures(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the "data" of two records is of the same images; older ones do not tell files nor objects."""
    told = ("train", "val", "sha256", *({"files", "objects"} & one.keys() & other.keys()))
    return all(one.get(key) == other.get(key) for key in told)


def counts(record: dict[str, Any]) -> bool:
    """Whether a record may enter a table: finished, of a commit that is known, with no change to it."""
    return record["status"] == "complete" and record["commit"] is not None and record["dirty"] is False
