"""Settings that are also command-line options. Imports no torch: the help is made from it."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str, metavar: str | None = None) -> Any:
    """A field of a settings dataclass, with its default and its help on the command line."""
    return field(default=default, metadata={"help": help, "metavar": metavar})
