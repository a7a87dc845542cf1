"""Fields of settings that are options of the command line. Imports no torch: the help is made from it."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str, metavar: str | None = None) -> Any:
    """A field of a settings dataclass, with its default and what the command line says of it."""
    return field(default=default, metadata={"help": help, "metavar": metavar})
