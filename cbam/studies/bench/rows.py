"""The output of `cbam bench`: one CSV file per device, written after every row."""

import csv
import io
import re
from pathlib import Path
from typing import Any

from cbam.errors import OutputError
from cbam.studies.folder import check_folder
from cbam.train import checkpoint

# The columns of a case; its implementations are timed in turns, and replaced together.
CASE = ("op", "shape", "dtype", "layout", "mode", "kernels", "threads")


class Rows:
    """<device>-torch<version>[-memory-kept][-quick].csv in a folder; only rows of the same case are replaced.

    Args:
        quick: whether the rows are of `--quick`, which has its own file.

    Raises:
        ConfigError: `folder` is a file. OutputError: it cannot be written to.
    """

    def __init__(self, folder: Path, *, quick: bool = False) -> None:
        check_folder(folder)
        self.folder, self.quick = folder, quick
        self.path: Path | None = None  # set by the first row
        self._earlier: list[dict[str, str]] = []
        self._new: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and rewrite the file.

        Raises:
            OutputError: it cannot be written, or an existing file is not a table of `cbam bench`.
        """
        if self.path is None:
            path = self.folder / self._name(row)
            self._earlier, self.path = _read(path), path
        self._new.append(row)
        cases = {_case(row) for row in self._new}
        rows = [*(row for row in self._earlier if _case(row) not in cases), *self._new]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write(self.path, text.getvalue().encode())
        except OSError as error:
            raise OutputError.at(self.folder, error) from error

    def _name(self, row: dict[str, Any]) -> str:
        device = "-".join(re.findall(r"[\w.]+", row["device"]))
        kept, quick = "-memory-kept" if row["memory"] == "kept" else "", "-quick" if self.quick else ""
        return f"{device}-torch{row['torch'].partition('+')[0]}{kept}{quick}.csv"


def _case(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in CASE)


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of an earlier run."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError.at(path, error) from error
    except (UnicodeDecodeError, csv.Error):
        rows = [{}]
    if any(None in row or None in row.values() or not row.keys() >= set(CASE) for row in rows):
        raise OutputError(f"{path} is not a table of `cbam bench`: move it away, or give another --out")
    return rows
