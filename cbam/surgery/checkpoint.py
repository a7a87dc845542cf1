"""Read a weights file without running code from it, and explain what is wrong with any other file."""

import pickle
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbam.errors import CheckpointError, CheckpointNotFoundError, MissingExtraError
from cbam.surgery.dialect import some


def read(path: Path) -> Any:
    """The contents of a safetensors file, or of a `torch.save` file with plain data.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: unreadable, damaged, not a weights file, or it asks to run code.
        MissingExtraError: the file is safetensors, and the package to read it is not installed.
    """
    try:
        size = _size(path)
        with path.open("rb") as file:
            start = file.read(64)
        if size == 0:
            raise CheckpointError(f"{path}: the file is empty")
        if start[8:9] == b"{" and not start.startswith(b"PK"):
            return _read_safetensors(path, size)
        if start.startswith(b"PK"):
            _check_archive(path, size)
        elif not start.startswith(b"\x80"):
            raise CheckpointError(f"{path}: not a weights file, it starts with {start[:20]!r}{_guess(start)}")
        return _read_torch(path)
    except CheckpointNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _size(path: Path) -> int:
    """The bytes of a file; from Python 3.14, `Path.exists` calls a file that cannot be reached absent."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a zero byte
        raise CheckpointNotFoundError(f"{path}: no such file") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: not a file")
    return found.st_size


def _guess(start: bytes) -> str:
    if start.lstrip().startswith(b"<"):
        return ", probably a web page saved by a failed download"
    if start.startswith(b"version https://git-lfs"):
        return ", a Git LFS pointer in place of the file: run git lfs pull"
    return ""


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtraError.of("reading a safetensors file", "vision") from error
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # safetensors has one class for all other errors
        raise CheckpointError(
            f"{path}: damaged or cut off ({size} bytes, read as safetensors): {error}"
        ) from error


def _check_archive(path: Path, size: int) -> None:
    """Raise if a zip archive is cut off, fails its checksums, or claims to unpack to more than its size."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.filename.endswith("/constants.pkl") for member in members):
                raise CheckpointError(f"{path}: a TorchScript program; save its state_dict() instead")
            unpacked = sum(member.file_size for member in members)
            if unpacked > size:
                raise CheckpointError(
                    f"{path}: claims to unpack to {unpacked} bytes out of {size}; torch.save never compresses"
                )
            if not any(member.filename.endswith("/data.pkl") for member in members):
                raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged or cut off ({size} bytes): {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged, the checksum of {damaged} is wrong")


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := _unsafe_globals(path, error):
            raise CheckpointError(
                f"{path}: refused, it asks to run {some(found)}, which plain weights never need. If "
                "you trust it, save only the weights where it was made: torch.save(model.state_dict(), path)"
            ) from None
        raise CheckpointError(f"{path}: damaged or not plain weights: {_reason(error)}") from error
    except OSError:
        raise
    except Exception as error:  # torch raises almost any builtin error for a damaged file
        raise CheckpointError(f"{path}: damaged or not plain weights: {_reason(error)}") from error


def _unsafe_globals(path: Path, error: Exception) -> list[str]:
    """The globals in a pickle that plain weights do not need."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not an archive, or one that cannot be disassembled: the error names one global
        found = []
    return sorted(found) or re.findall(r"(?:GLOBAL|class|function) ([\w.]+) ", str(error))


def _reason(error: Exception) -> str:
    """The first line of an error, without torch's advice to load the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return text.partition("\n")[0] or type(error).__name__
