"""The exceptions that cbam raises. Each also derives from the built-in one that a caller would catch.

`exit_code` is the exit status of the command line for it (see `cbam --help`).
"""

import re
from collections.abc import Sequence


def first_line(error: BaseException, longest: int = 120) -> str:
    """The first line of an error's message, without colour codes and cut to `longest` characters.

    The class name if the message is empty.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return (text.splitlines() or [type(error).__name__])[0].strip()[:longest]


class CBAMError(Exception):
    """Base class of all errors that cbam raises on purpose."""

    exit_code = 1


class InputError(CBAMError, ValueError):
    """An argument or a tensor has the wrong shape, size or value."""

    exit_code = 2


class DtypeError(CBAMError, TypeError):
    """A tensor or a module has a dtype in which attention cannot be computed."""

    exit_code = 2


class ConfigError(CBAMError, ValueError):
    """A setting or a name is unknown, or settings do not go together."""

    exit_code = 2


class AttachError(CBAMError, RuntimeError):
    """Attention could not be attached or detached; the model is unchanged."""

    exit_code = 2


class NoPlaceError(AttachError):
    """A model has no residual block to attach attention to, and no other place was given."""


class DataError(CBAMError, ValueError):
    """A data set is missing, empty, inconsistent or unreadable."""

    exit_code = 3


class CheckpointError(CBAMError, RuntimeError):
    """A weights file is missing, damaged or unsafe, or does not fit; the model is unchanged."""

    exit_code = 4


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A weights file does not exist."""


class OtherClassesError(CheckpointError):
    """A weights file fits except for its last layer, which is for other classes; the model is unchanged.

    Attributes:
        summary: the file, and what does not fit.
        classes: the number of classes of the file.
    """

    def __init__(self, summary: str, classes: int, advice: str) -> None:
        super().__init__(f"{summary}. These weights are for {classes} classes: {advice}")
        self.summary, self.classes = summary, classes

    def advising(self, advice: str) -> "OtherClassesError":
        """The same error with the advice for another way of giving the file."""
        return OtherClassesError(self.summary, self.classes, advice)


class NonFiniteError(CBAMError, ArithmeticError):
    """A loss, a score or a map became NaN or infinite, and was not used any further."""

    exit_code = 5


class StoppedError(CBAMError, RuntimeError):
    """Training was stopped from outside or by its time limit, and can be resumed."""

    exit_code = 75

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OutOfMemoryError(CBAMError, MemoryError):
    """The device or the machine ran out of memory; what was saved is intact."""

    exit_code = 6


class DistributedError(CBAMError, RuntimeError):
    """A process of a distributed run is gone or does not answer, or the processes cannot connect."""

    exit_code = 9


class OutputError(CBAMError, OSError):
    """A result cannot be written: no permission, no space or no such folder."""

    exit_code = 7

    @classmethod
    def at(cls, out: object, error: OSError) -> "OutputError":
        """The error for the --out path `out`, which cannot be written."""
        return cls(f"cannot write to {out}: {error.strerror or error}; give another --out")


class ExportError(CBAMError, RuntimeError):
    """A network cannot be exported, or the file would compute something else; no file is written."""

    exit_code = 10


class MissingExtraError(CBAMError, ImportError):
    """An optional dependency is missing; the message contains the pip command."""

    exit_code = 8

    @classmethod
    def of(cls, what: str, extra: str, missing: Sequence[str] = ()) -> "MissingExtraError":
        """The error for `what`, which needs the packages of `extra`; `missing` names the absent ones."""
        lacking = f" ({', '.join(missing)} missing)" if missing else ""
        # The second command is for a checkout that was not installed.
        line = f"pip install 'cbam[{extra}]', or in a checkout pip install '.[{extra}]'"
        return cls(f"{what} needs optional packages{lacking}: {line}")

    @classmethod
    def torch(cls) -> "MissingExtraError":
        """The error for a missing torch, as after `pip install --no-deps`."""
        return cls(
            "cbam needs torch 2.10 or newer: pip install torch; pytorch.org says which build to choose"
        )
