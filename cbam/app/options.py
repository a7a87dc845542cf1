"""Shared by the commands: options from dataclass fields, argument types, required extras, SIGTERM."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from cbam.app.config import expected_type, read_config
from cbam.errors import ConfigError, MissingExtraError


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the nearest option or choice."""

    def error(self, message: str):
        raise ConfigError(f"{message} (see `{self.prog} --help`)")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        found, left = super().parse_known_args(args, namespace)
        for argument in left:
            if argument.startswith("-"):
                self.error(f"unknown option {argument}{self._hint(argument)}")
        return found, self._fill_positionals(found, left)

    def _fill_positionals(self, found: argparse.Namespace, left: list[str]) -> list[str]:
        """Assign leftover arguments to optional positionals, which argparse decides are absent too early.

        In `eval RUN --device cpu DATA` it decides at RUN that there is no DATA.
        """
        for action in self._get_positional_actions():
            value = getattr(found, action.dest, None)
            if action.nargs == argparse.ZERO_OR_MORE:
                setattr(found, action.dest, [*(value or []), *left])
                return []
            if action.nargs == argparse.OPTIONAL and left and value in (None, action.default):
                setattr(found, action.dest, left[0])
                left = left[1:]
        return left

    def _check_value(self, action, value) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _nearest(str(value), map(str, action.choices or ()))
            raise

    def _hint(self, argument: str) -> str:
        return _nearest(argument.partition("=")[0], self._option_string_actions)


def _nearest(text: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(text, list(known), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def add_setting(parser: Parser, field: dataclasses.Field, *, of_recipe: bool = False) -> None:
    """Add an option for a field. It has no default, so that only given options are set."""
    how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field, of_recipe)}
    if field.name == "data":
        parser.add_argument("data", nargs="?", metavar="DATA", **how)
        return
    flag = "--" + field.name.replace("_", "-")
    if field.type is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **how)
        return
    how["metavar"] = field.metadata["metavar"]
    if field.type is int or "int" in str(field.type):
        how["type"] = _reader(int, field)
    elif "float" in str(field.type):
        how["type"] = _reader(float, field)
    if "tuple" in str(field.type):
        how["nargs"] = "+"
    parser.add_argument(flag, **how)


def _help(field: dataclasses.Field, of_recipe: bool) -> str:
    text, default = field.metadata["help"].replace("%", "%%"), field.default
    if default is None or default is False or of_recipe:
        return text
    return f"{text} (default: {' '.join(default) if isinstance(default, tuple) else default})"


def _reader(kind: type, field: dataclasses.Field):
    def read(text: str):
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {expected_type(field)}, got {text!r}") from None

    return read


def given(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The settings for the dataclass `kind`, from the file of --config, overridden by the command line."""
    found: dict[str, Any] = read_config(options.config, kind) if options.config else {}
    for field in dataclasses.fields(kind):
        if hasattr(options, field.name):
            value = getattr(options, field.name)
            found[field.name] = tuple(value) if isinstance(value, list) else value
    return found


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")


def deviation(text: str) -> float:
    """A standard deviation of values from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"must be a number above 0, at most 1, got {text!r}")


def duration(text: str) -> float:
    """Seconds: "90s", "90m", "11.5h" or "H:MM:SS"."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text):
        seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
    elif match := re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", text):
        seconds = 3600.0 * int(match[1]) + 60 * int(match[2]) + int(match[3])
    else:
        raise argparse.ArgumentTypeError(f"must be a time such as 90m, 11.5h or 11:30:00, got {text!r}")
    return seconds


def add_normalisation(parser: Parser) -> None:
    """Add the normalisation options, for weights files that do not record it."""
    for flag, kind, words in (("--mean", share, "mean"), ("--std", deviation, "standard deviation")):
        parser.add_argument(
            flag, nargs=3, type=kind, metavar=("R", "G", "B"),
            help=f"{words} that a weights file was trained with, for values in [0, 1] (default: ImageNet's)",
        )  # fmt: skip


def need(what: str, extras: dict[str, tuple[str, ...]]) -> None:
    """Raise before any work is done if a package of these extras is not installed."""
    missing = {
        extra: [n for n in names if importlib.util.find_spec(n) is None] for extra, names in extras.items()
    }
    wanted_extras = ",".join(extra for extra, names in missing.items() if names)
    if wanted_extras:
        raise MissingExtraError.of(what, wanted_extras, [name for own in missing.values() for name in own])


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C, so that finished work is reported."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise SIGTERM as `Terminated` inside the block."""

    def terminate(*_) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
