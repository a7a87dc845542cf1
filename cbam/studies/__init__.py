"""Trainings that answer a question, and the tables computed from their records."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbam.studies.compare import compare
    from cbam.studies.settings import Settings

__all__ = ["Settings", "compare"]


def __getattr__(name: str):
    # The command line reads Settings for its help, which must not wait for torch.
    if name == "Settings":
        return importlib.import_module("cbam.studies.settings").Settings
    if name == "compare":
        # The function takes the place of the submodule of the same name.
        value = importlib.import_module("cbam.studies.compare").compare
        globals()[name] = value
        return value
    raise AttributeError(f"module 'cbam.studies' has no attribute {name!r}")
