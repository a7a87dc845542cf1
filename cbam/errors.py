"""The errors a caller can meet. Each is also the builtin that a caller would catch.

`exit_code` is what the command line returns for it (see `cbam --help`).
"""

import re
from collections.abc import Sequence


def first_line(error: BaseException, longest: int = 120) -> str:
    """The first line of what an error says, without colours and cut at `longest` characters.

    Its class where it says nothing.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return (text.splitlines() or [type(error).__name__])[0].strip()[:longest]


class CBAMError(Exception):
    """Base of every error raised on purpose by cbam."""

    exit_code = 1


class InputError(CBAMError, ValueError):
    """An argument or a tensor is of the wrong shape, size or value."""

    exit_code = 2


class DtypeError(CBAMError, TypeError):
    """A tensor or a module has a dtype that attention cannot be computed in."""

    exit_code = 2


class ConfigError(CBAMError, ValueError):
    """A setting, a name or a combination of settings is not one we know."""

    exit_code = 2


class AttachError(CBAMError, RuntimeError):
    """Attention could not be put into, or taken out of, a model; the model is unchanged."""

    exit_code = 2


class NoPlaceError(AttachError):
    """A model has no residual block that attention would be put into, and nobody said where else."""


class DataError(CBAMError, ValueError):
    """A data set is missing, empty, inconsistent or unreadable."""

    exit_code = 3


class CheckpointError(CBAMError, RuntimeError):
    """A weights file is missing, damaged, unsafe or does not fit; the model is unchanged."""

    exit_code = 4


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A weights file does not exist."""


class OtherClassesError(CheckpointError):
    """A weights file fits but for the last layer, which is for other classes; the model is unchanged.

    Attributes:
        told: the file, and what does not fit.
        classes: how many it is for.
    """

    def __init__(self, told: str, classes: int, advice: str) -> None:
        super().__init__(f"{told}. These weights are for {classes} classes: {advice}")
        self.told, self.classes = told, classes

    def advising(self, advice: str) -> "OtherClassesError":
        """The same with advice for those who gave the file in another way."""
        return OtherClassesError(self.told, self.classes, advice)


class NonFiniteError(CBAMError, ArithmeticError):
    """A loss, a score or a map became NaN or infinite; nothing was computed on with it."""

    exit_code = 5


class StoppedError(CBAMError, RuntimeError):
    """A training was stopped from outside, or by its time limit, and can be resumed."""

    exit_code = 75

    def __init__(self, message: str, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OutOfMemoryError(CBAMError, MemoryError):
    """The memory of the device, or of the machine, does not suffice; what was saved is intact."""

    exit_code = 6


class DistributedError(CBAMError, RuntimeError):
    """One of several processes is gone, does not answer, or they cannot meet."""

    exit_code = 9


class OutputError(CBAMError, OSError):
    """A result cannot be written: no permission, no room, no such place."""

    exit_code = 7

    @classmethod
    def at(cls, out: object, error: OSError) -> "OutputError":
        """The error for `out`, a place that --out named, which cannot be written."""
        return cls(f"cannot write to {out}: {error.strerror or error}; give another --out")


class ExportError(CBAMError, RuntimeError):
    """A network cannot be exported, or the file would compute something else; there is no file."""

    exit_code = 10


class MissingExtraError(CBAMError, ImportError):
    """An optional dependency is needed; the message holds the pip line."""

    exit_code = 8

    @classmethod
    def of(cls, what: str, extra: str, missing: Sequence[str] = ()) -> "MissingExtraError":
        """The error for `what` needing the optional dependencies `extra`; `missing` are absent."""
        lacking = f" ({', '.join(missing)} missing)" if missing else ""
        # The first line finds cbam where it is installed; the second is for a checkout that only runs.
        line = f"pip install 'cbam[{extra}]', or in a checkout pip install '.[{extra}]'"
        return cls(f"{what} needs optional packages{lacking}: {line}")

    @classmethod
    def torch(cls) -> "MissingExtraError":
        """The error for torch itself being absent, as after `pip install --no-deps`."""
        return cls("cbam needs torch, 2.10 or newer: pip install torch; its own site says which build")
