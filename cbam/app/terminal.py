"""Terminal output and progress: one bar in a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from typing import TextIO

ESTIMATE_AFTER = 300.0  # seconds after which the time left is estimated even if less than 2 % are done
_PLAIN = str.maketrans({"±": "+-", "×": "x", "…": "...", "–": "-", "→": "->"})


def show(line: str, stream: TextIO | None = None) -> None:
    """Print a line. A closed pipe or an encoding without some character is not an error."""
    stream = stream or sys.stdout
    if stream is None:  # closed before the start
        return
    try:
        stream.write(printable(line, stream) + "\n")
        stream.flush()
    except (BrokenPipeError, ValueError):
        silence(stream)


def counted(n: int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def printable(line: str, stream: TextIO) -> str:
    """Replace the characters of `line` that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return line.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    return line


def silence(stream: TextIO | None) -> None:
    """Discard further output to `stream`, including what the interpreter flushes at exit."""
    import os

    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        pass


def _log(line: str, stream: TextIO | None = None) -> None:
    """Print a line of progress. A full disk is reported once and does not stop the work."""
    try:
        show(line, stream)
    except OSError as error:
        silence(stream or sys.stdout)
        with contextlib.suppress(OSError):  # stderr may be on the same disk
            show(f"cbam: {error.strerror}: no more progress lines, the work continues", sys.stderr)


class Lines:
    """Progress for logs and pipes: a line per phase, with the share done and the time left."""

    every = 30.0  # seconds between two lines about the same phase

    def __init__(self, stream: TextIO | None = None) -> None:
        self.done, self.skipped, self.began = 0.0, 0.0, time.monotonic()
        self._stream = stream

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        pass

    def say(self, line: str) -> None:
        _log(line)

    def now(self, what: str) -> None:
        _log(f"[{100 * self.done:3.0f} %{self._left()}] {what}", self._stream)

    def advance(self, share: float) -> None:
        self.done += share

    def skip(self, share: float) -> None:
        self.done += share
        self.skipped += share

    def _left(self) -> str:
        here, passed = self.done - self.skipped, time.monotonic() - self.began
        if here <= 0 or (here < 0.02 and passed < ESTIMATE_AFTER):
            return ""
        # The shares are floats, so their sum may slightly exceed 1.
        minutes, seconds = divmod(round(passed * max(0.0, 1 - self.done) / here), 60)
        hours, minutes = divmod(minutes, 60)
        return f", {hours}:{minutes:02}:{seconds:02} left" if hours else f", {minutes}:{seconds:02} left"


class Bar:
    """One progress bar for the whole work, with the current phase and the time left."""

    every = 1.0  # seconds between two updates of its text

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(highlight=False),
            transient=True,
            speed_estimate_period=120,
        )
        self._task = self._bar.add_task("starting", total=1.0)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self._bar.console.print(printable(line, sys.stdout), markup=False, soft_wrap=True)

    def now(self, what: str) -> None:
        self._bar.update(self._task, description=what.replace("[", "("))

    def advance(self, share: float) -> None:
        self._bar.advance(self._task, share)

    skip = advance  # rich does not count the first update in its speed


class NoOutput(Lines):
    """No output, for all processes but the first."""

    def say(self, line: str) -> None:
        pass

    def now(self, what: str) -> None:
        pass


def progress(*, quiet: bool = False, line_stream: TextIO | None = None) -> Lines | Bar:
    """A bar in a terminal, lines elsewhere; nothing if `quiet`.

    `line_stream` is the stream for the lines, if standard output is for another program.
    """
    if quiet:
        return NoOutput()
    if sys.stdout is None or not sys.stdout.isatty():
        return Lines(line_stream)
    try:
        return Bar()
    except ImportError:
        return Lines(line_stream)


class Counter:
    """Reports images to `watch` as they are processed, at intervals, since there may be a million."""

    def __init__(self, watch: Lines | Bar) -> None:
        self._watch, self._count, self._share, self._last = watch, 0, 0.0, time.monotonic()

    def passed(self, share: float) -> None:
        """Count one more image, which is `share` of the whole."""
        self._count, self._share = self._count + 1, self._share + share
        if time.monotonic() < self._last + self._watch.every:
            return
        self._watch.advance(self._share)
        self._watch.now(f"{counted(self._count, 'image')} checked")
        self._share, self._last = 0.0, time.monotonic()
