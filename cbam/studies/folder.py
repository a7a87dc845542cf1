"""The report folder: checked before any work is done; files are written atomically."""

import contextlib
import json
import os
from pathlib import Path

from cbam.errors import ConfigError, OutputError
from cbam.train import checkpoint

RESULTS, REPORT, PAGE = "results.json", "report.md", "report.html"
PICTURE, DRAWING = "picture.png", "picture.svg"
WEIGHTS = ".cbam.safetensors"  # suffix of the weights of an arm


class ReportFolder:
    """A folder for the files of one report; other files in it are never touched.

    Nothing is left on the disk until the first file is written.

    Raises:
        ConfigError: it is not empty and `overwrite` is false.
        OutputError: it cannot be created or written to.
    """

    def __init__(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.wrote = False
        self._stale = [RESULTS, REPORT, PAGE, PICTURE, DRAWING, f"*{WEIGHTS}"]
        try:
            if not overwrite and self.path.is_dir() and any(self.path.iterdir()):
                raise ConfigError(f"{self.path} is not empty: give another --out, or --overwrite")
        except OSError as error:
            raise OutputError.at(self.path, error) from error
        check_folder(self.path)

    def write(self, name: str, content: str | bytes) -> Path:
        """Write `content` to the file `name`: temporary file, fsync, rename, fsync of the folder."""
        data = content.encode() if isinstance(content, str) else content
        target = self.path / name
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_stale(name)
            checkpoint.write(target, data)
            self.wrote = True
        except OSError as error:
            raise OutputError.at(self.path, error) from error
        return target

    def write_results(self, results: dict) -> Path:
        """Write `results` as JSON; NaN and infinity, which JSON lacks, raise ValueError."""
        return self.write(RESULTS, json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n")

    def _remove_stale(self, kept: str) -> None:
        """Remove the files of an earlier report, which must not mix with this one."""
        for path in [path for name in self._stale for path in self.path.glob(name) if path.name != kept]:
            path.unlink()
        self._stale = []


def check_folder(path: Path) -> None:
    """Check that a folder is writable, by a small file in it or in its nearest existing parent.

    Raises:
        ConfigError: it is a file. OutputError: it cannot be created or written to.
    """
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file, not a folder: give another --out")
        place = path
        while not place.exists() and place != place.parent:
            place = place.parent
        part, probe = place / f".cbam-{os.getpid()}.part", place / f".cbam-{os.getpid()}"
        try:
            part.write_bytes(b"0" * 65536)
            part.replace(probe)
        finally:
            for file in (part, probe):
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError.at(path, error) from error
