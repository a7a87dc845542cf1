"""Checkpoint files, written atomically and verified by SHA-256 before anything in them is used.

A file is the output of `torch.save`, with the digest of those bytes as the comment of the zip archive. So one
rename publishes both (a separate digest file could be one step behind), `torch.load` and `cbam.load_weights`
read the file like any other, and a flipped bit anywhere is detected.
"""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cbam.errors import CheckpointError, CheckpointNotFoundError
from cbam.files import sync_folder
from cbam.surgery.checkpoint import read
from cbam.train.fault import fault

SCHEMA = 1
LAST = "last.json"
_NAME = re.compile(r"step-(\d{8,})\.ckpt")
_MARK = b"cbam sha256 "
_COMMENT = len(_MARK) + 64


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state`, of plain values and tensors, as the checkpoint after `step` steps of the whole run.

    Raises:
        OSError: no space or no permission; existing checkpoints are unchanged.
    """
    buffer = io.BytesIO()
    torch.save({"schema": SCHEMA, **state}, buffer)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    # The last two bytes of a zip archive are the length of its comment, 0 here.
    data = b"".join((data[:-2], _COMMENT.to_bytes(2, "little"), _MARK, digest.encode()))
    path = folder / f"step-{step:08d}.ckpt"
    write(path, data, fault)
    try:
        write(folder / LAST, _record(path, digest, len(data), state))
    except OSError:  # the checkpoint is found without the record, but a stale record would describe another
        with contextlib.suppress(OSError):
            (folder / LAST).unlink(missing_ok=True)
    return path


def _record(path: Path, digest: str, size: int, state: dict[str, Any]) -> bytes:
    record = {"file": path.name, "sha256": digest, "bytes": size}
    record |= {name: state[name] for name in ("epoch", "step") if name in state}
    return (json.dumps(record) + "\n").encode()


def write(path: Path, data: bytes, at: Callable[[str], None] = lambda point: None) -> None:
    """Write `data` to `path` atomically: temporary file, fsync, rename, fsync of the folder.

    `at` is called at each point where a test may kill the process.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            at("save:open")
            file.write(data[: len(data) // 2])
            file.flush()
            at("save:half")
            file.write(data[len(data) // 2 :])
            file.flush()
            at("save:pre_fsync")
            os.fsync(file.fileno())
        at("save:pre_rename")
        part.replace(path)
        sync_folder(path.parent)
        at("save:post_rename")
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any]:
    """Load what `save` wrote, on the CPU. The digest is verified first, and no code in the file is run.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: damaged, not one of our checkpoints, from a newer version, or asking to run code.
    """
    if problem := damage(path):
        raise CheckpointError(f"{path}: {problem}")
    return _intact(path)


def _intact(path: Path) -> dict[str, Any]:
    """The contents of an undamaged checkpoint."""
    state = read(path)
    if not isinstance(state, dict) or type(state.get("schema")) is not int:
        raise CheckpointError(f"{path}: not a checkpoint of cbam train")
    if state["schema"] > SCHEMA:
        raise CheckpointError(
            f"{path}: written by a newer cbam (format {state['schema']}, known up to {SCHEMA}); upgrade cbam"
        )
    return state


def damage(path: Path) -> str:
    """What is wrong with a checkpoint's bytes, or why they cannot be read; empty if they are intact.

    Raises:
        CheckpointNotFoundError: no such file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    comment = data[-_COMMENT:]
    if not data or not comment.startswith(_MARK):
        return _describe_cut(path, data)
    body, length = data[: -_COMMENT - 2], data[-_COMMENT - 2 : -_COMMENT]
    digest = hashlib.sha256(body + b"\0\0").hexdigest()
    if length != _COMMENT.to_bytes(2, "little") or digest.encode() != comment[len(_MARK) :]:
        return "damaged, its SHA-256 does not match the recorded one"
    return ""


def _describe_cut(path: Path, data: bytes) -> str:
    if not data:
        return "the file is empty"
    if data.lstrip()[:1] == b"<":
        return f"starts with {data[:20]!r}, probably a web page saved by a failed download"
    recorded = last(path.parent)
    if recorded.get("file") == path.name and len(data) < recorded["bytes"]:
        return f"{100 * len(data) / recorded['bytes']:.3g} % of its recorded size"
    return "cut off, or not a checkpoint of cbam train: there is no SHA-256 at its end"


def last(folder: Path) -> dict[str, Any]:
    """The record of the newest checkpoint; empty if it is missing or unreadable."""
    try:
        record = json.loads((folder / LAST).read_text("utf-8"))
        return record if isinstance(record, dict) and type(record.get("bytes")) is int else {}
    except (OSError, ValueError):
        return {}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, the newest first."""
    found = [path for path in folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its file name; -1 for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def is_ours(path: Path) -> bool:
    """Whether a file is a checkpoint of a run, even if renamed; a cut-off one is recognised by its name."""
    if step_of(path) >= 0:
        return True
    try:
        with path.open("rb") as file:
            file.seek(-_COMMENT, os.SEEK_END)
            return file.read(len(_MARK)) == _MARK
    except OSError:  # too short, or unreadable: whoever reads it next reports why
        return False


def newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint of a folder and its contents, or None if there are no checkpoints.

    Damaged or unreadable checkpoints are skipped in favour of an older one, and `say` reports them in one
    line. One that is intact but refused (it asks to run code, or is from a newer version) is an error:
    falling back to an older one would hide it.

    Raises:
        CheckpointError: there are checkpoints, but none is valid; a run never silently starts over.
    """
    found, damaged = checkpoints(folder), []
    for path in found:
        if problem := damage(path):
            damaged.append(f"{path.name}: {problem}")
            continue
        state = _intact(path)
        if damaged:
            say(f"{'; '.join(damaged)}; using {path.name} (step {step_of(path)})")
        return path, state
    if damaged:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} is valid: {'; '.join(damaged[:3])}; "
            "give another --out to start over"
        )
    return None


def rotate(saved: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `saved`, after reading `saved` back to verify it.

    Later ones are kept: they are damaged, and the run did not resume from them.

    Raises:
        CheckpointError: `saved` is damaged or unreadable; nothing was deleted. OSError.
    """
    older = [path for path in checkpoints(saved.parent) if step_of(path) <= step_of(saved)][keep:]
    if older and (problem := damage(saved)):
        raise CheckpointError(f"{saved}: {problem}")
    for path in older:
        fault("rotate")
        path.unlink(missing_ok=True)
