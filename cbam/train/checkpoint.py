"""Checkpoint files: whole or not there, checked by SHA-256 before anything in them is used.

A file is what `torch.save` wrote, with the digest of those bytes as the comment of the zip archive. So the
digest appears with the bytes in one rename (a second file beside it could be a step behind), `torch.load` and
`cbam.load_weights` read the file as they read any other, and a flipped bit is found wherever it is.
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
        OSError: no room or no permission; what was there before is as it was.
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
    except OSError:  # the checkpoint is there, and is found without; of another one it must not speak
        with contextlib.suppress(OSError):
            (folder / LAST).unlink(missing_ok=True)
    return path


def _record(path: Path, digest: str, size: int, state: dict[str, Any]) -> bytes:
    told = {"file": path.name, "sha256": digest, "bytes": size}
    told |= {name: state[name] for name in ("epoch", "step") if name in state}
    return (json.dumps(told) + "\n").encode()


def write(path: Path, data: bytes, at: Callable[[str], None] = lambda point: None) -> None:
    """Put `data` into `path`: temporary file, fsync, rename, fsync of the folder. `at` is told each point."""
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
    """What `save` wrote, on the CPU. Nothing of a file is used unless its digest holds; no code of it runs.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: damaged, no checkpoint of ours, of a newer version, or one that asks to run code.
    """
    if fault_found := damage(path):
        raise CheckpointError(f"{path}: {fault_found}")
    return _intact(path)


def _intact(path: Path) -> dict[str, Any]:
    """What a checkpoint without damage holds."""
    state = read(path)
    if not isinstance(state, dict) or type(state.get("schema")) is not int:
        raise CheckpointError(f"{path}: not a checkpoint of cbam train")
    if state["schema"] > SCHEMA:
        raise CheckpointError(
            f"{path}: written by a newer cbam (format {state['schema']}, known up to {SCHEMA}); upgrade cbam"
        )
    return state


def damage(path: Path) -> str:
    """What is wrong with the bytes of a checkpoint, or why they cannot be read; empty if nothing is wrong.

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
        return _cut(path, data)
    body, length = data[: -_COMMENT - 2], data[-_COMMENT - 2 : -_COMMENT]
    digest = hashlib.sha256(body + b"\0\0").hexdigest()
    if length != _COMMENT.to_bytes(2, "little") or digest.encode() != comment[len(_MARK) :]:
        return "damaged, its SHA-256 is not the recorded one"
    return ""


def _cut(path: Path, data: bytes) -> str:
    if not data:
        return "the file is empty"
    if data.lstrip()[:1] == b"<":
        return f"starts with {data[:20]!r}, probably a web page saved by a failed download"
    recorded = last(path.parent)
    if recorded.get("file") == path.name and len(data) < recorded["bytes"]:
        return f"{100 * len(data) / recorded['bytes']:.3g} % of its recorded size"
    return "cut off, or no checkpoint of cbam train: its SHA-256 is not at its end"


def last(folder: Path) -> dict[str, Any]:
    """The record of the newest checkpoint, empty where there is none that can be read."""
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
    """After how many steps `save` wrote a checkpoint, by its name; -1 for another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def is_ours(path: Path) -> bool:
    """Whether a file is a checkpoint of a run, also under another name; a cut-off one is told by its name."""
    if step_of(path) >= 0:
        return True
    try:
        with path.open("rb") as file:
            file.seek(-_COMMENT, os.SEEK_END)
            return file.read(len(_MARK)) == _MARK
    except OSError:  # shorter than that, or what reads it says why it cannot be read
        return False


def newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint of a folder and what it holds, or None where there are no checkpoints.

    One that is damaged, or that the disk does not give back, is passed over in favour of an older one, and
    `say` is told so in one line. One that is intact and yet refused (it asks to run code, or is of a newer
    version) is no accident: nothing replaces it.

    Raises:
        CheckpointError: there are checkpoints, but none is valid; a run never starts afresh in silence.
    """
    found, damaged = checkpoints(folder), []
    for path in found:
        if fault_found := damage(path):
            damaged.append(f"{path.name}: {fault_found}")
            continue
        state = _intact(path)
        if damaged:
            say(f"{'; '.join(damaged)}; using {path.name} (step {step_of(path)})")
        return path, state
    if damaged:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} is valid: {'; '.join(damaged[:3])}; "
            "give another --out to start anew"
        )
    return None


def rotate(saved: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `saved`, once that has been read back and holds.

    A later one, a damaged one that the run did not go on from, is left where it is.

    Raises:
        CheckpointError: `saved` is damaged, or cannot be read; nothing was deleted. OSError.
    """
    older = [path for path in checkpoints(saved.parent) if step_of(path) <= step_of(saved)][keep:]
    if older and (fault_found := damage(saved)):
        raise CheckpointError(f"{saved}: {fault_found}")
    for path in older:
        fault("rotate")
        path.unlink(missing_ok=True)
