"""A JSON reader that records where in the file each element of the outer lists begins.

NaN and Infinity, which the json module accepts beyond the standard, are refused, and every fault has a line
and a column. The elements of the outer lists are decoded one by one with the json module's own scanner.
"""

import bisect
import json
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cbam.data.decode import read_text, shown
from cbam.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(?P<name>NaN|-?Infinity)', re.DOTALL)
_STRICT = json.JSONDecoder(parse_constant=lambda name: _refuse(name))
_LENIENT = json.JSONDecoder()


class Element(NamedTuple):
    """A decoded value, its position in the text, and the position of a NaN or Infinity in it, if any."""

    value: Any
    start: int
    constant: int | None = None


class _ConstantError(ValueError):
    pass


class _MisplacedError(ValueError):
    """A fault at a position of the text."""

    def __init__(self, what: str, at: int) -> None:
        super().__init__(what)
        self.what, self.at = what, at


class LocatedJSON:
    """The file at `path`, whose outermost value is an object.

    Raises:
        DataError: it cannot be read, or is not JSON; the message gives line and column. A NaN or Infinity in
            an element of a list is left to the reader of the element, which knows its id.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.text = read_text(path)
        try:
            self._keys = dict(self._members())
        except _MisplacedError as fault:
            raise self.error(fault.what, fault.at) from None

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def elements(self, key: str) -> list[Element] | None:
        """The elements of the list under `key`; None if the value is not a list."""
        return self._keys[key]

    def error(self, what: str, at: int) -> DataError:
        """The error for a fault at a position of the text."""
        return DataError(f"{self.where(at)}: {what}")

    def where(self, at: int) -> str:
        """File, line and column of a position of the text, both from 1."""
        line = bisect.bisect_left(self._breaks, at)
        start = self._breaks[line - 1] + 1 if line else 0
        return f"{shown(self.path)} line {line + 1} column {at - start + 1}"

    @cached_property
    def _breaks(self) -> list[int]:
        return [match.start() for match in re.finditer("\n", self.text)]

    def _members(self) -> Iterator[tuple[str, list[Element] | None]]:
        """Yield each key of the outermost object with the elements of its list, or None for other values."""
        seen: set[str] = set()
        at = self._skip(self._expect("{", self._skip(0), "an object, as a COCO file is"))
        while self._next(at, "}"):
            if seen:
                at = self._expect(",", at, "',' or '}'")
            name, start = self._decode(at := self._skip(at))
            if not isinstance(name.value, str) or name.value in seen:
                raise _MisplacedError(f"{name.value!r} is not a key, or a duplicate", name.start)
            seen.add(name.value)
            at = self._skip(self._expect(":", self._skip(start), "':'"))
            if self.text[at : at + 1] == "[":
                found: list[Element] = []
                at = self._list(at + 1, found)
                yield name.value, found
            else:
                value, at = self._decode(at)
                if value.constant is not None:
                    raise _MisplacedError("NaN and Infinity are not JSON", value.constant)
                yield name.value, None
            at = self._skip(at)
        if self._skip(at + 1) < len(self.text):
            raise _MisplacedError("more text after the end", self._skip(at + 1))

    def _list(self, at: int, found: list[Element]) -> int:
        """Decode the elements from `at` on; return the position after the closing bracket."""
        at = self._skip(at)
        while self._next(at, "]"):
            if found:
                at = self._skip(self._expect(",", at, "',' or ']'"))
            element, at = self._decode(at)
            found.append(element)
            at = self._skip(at)
        return at + 1

    def _decode(self, at: int) -> tuple[Element, int]:
        try:
            try:
                value, end = _STRICT.raw_decode(self.text, at)
                return Element(value, at), end
            except _ConstantError:
                value, end = _LENIENT.raw_decode(self.text, at)
                matches = _CONSTANT.finditer(self.text, at, end)
                return Element(value, at, next(m.start() for m in matches if m["name"])), end
        except json.JSONDecodeError as error:
            raise _MisplacedError(*self._explain(error)) from None
        except RecursionError:
            raise _MisplacedError("nested too deeply", at) from None
        except ValueError as error:  # an integer of thousands of digits
            raise _MisplacedError(str(error), at) from None

    def _explain(self, error: json.JSONDecodeError) -> tuple[str, int]:
        open_string = error.msg.startswith("Unterminated string")
        if open_string or self._skip(error.pos) >= len(self.text):
            return "the file is truncated", len(self.text) if not open_string else error.pos
        return error.msg, error.pos

    def _next(self, at: int, closing: str) -> bool:
        if at >= len(self.text):
            raise _MisplacedError("the file is truncated", at)
        return self.text[at] != closing

    def _expect(self, sign: str, at: int, what: str) -> int:
        if at >= len(self.text):
            raise _MisplacedError("the file is truncated", at)
        if self.text[at] != sign:
            raise _MisplacedError(f"expected {what}, found {self.text[at]!r}", at)
        return at + 1

    def _skip(self, at: int) -> int:
        match = _SPACE.match(self.text, at)
        assert match is not None
        return match.end()


def _refuse(name: str):
    raise _ConstantError(name)
