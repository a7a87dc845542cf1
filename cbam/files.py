"""Atomic file writing: files are written next to their target, synced to disk, and renamed."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cbam.errors import CBAMError, ConfigError, OutputError


@contextlib.contextmanager
def placed(*targets: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder for files named like `targets`; move them into place if the block succeeds.

    The targets are in one folder, and readers open the last one first. An existing last one is removed before
    the others are replaced, so that nobody reads a mixture of old and new files.

    Raises:
        ConfigError: a target exists, and `overwrite` is false.
        OutputError: no space, no permission or no such folder; existing files are unchanged.
    """
    last, part = targets[-1], None
    try:
        for target in targets:
            if target.is_dir() or (target.exists() and not overwrite):
                raise ConfigError(f"{target} exists: give another name, or overwrite")
        part = Path(tempfile.mkdtemp(prefix=f".{last.name[:100]}.", suffix=".part", dir=last.parent))
        yield part
        for target in targets:
            _sync(part / target.name)
        if len(targets) > 1:
            last.unlink(missing_ok=True)
        for target in targets:
            (part / target.name).replace(target)
        sync_folder(last.parent)
    except OSError as error:
        if isinstance(error, CBAMError):
            raise
        raise OutputError(f"{last} cannot be written: {error.strerror or error}") from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _sync(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power failure; some mounted file systems cannot."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
