"""Comparisons and studies: their training runs, and the tables computed from the records."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbam.studies.compare import compare
    from cbam.studies.folder import ReportFolder
    from cbam.studies.settings import Settings
    from cbam.train.watch import Watch

__all__ = ["ReportFolder", "Settings", "Watch", "compare"]

_HOME = {
    "ReportFolder": "studies.folder",
    "Settings": "studies.settings",
    "Watch": "train.watch",
    "compare": "studies.compare",
}


def __getattr__(name: str):
    # The command line builds its help from Settings, which must not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module 'cbam.studies' has no attribute {name!r}")
    # The function compare replaces the submodule of the same name.
    value = globals()[name] = getattr(importlib.import_module(f"cbam.{_HOME[name]}"), name)
    return value
