"""The command line `cbam`: dispatch to one module per command in cbam/app/commands, errors and exit codes.

Built on argparse, which answers `--help` in a few hundredths of a second and needs no other package;
jsonargparse alone takes a quarter of a second to import. torch is imported inside the commands.
"""

import argparse
import contextlib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import cbam
from cbam.app.options import Parser, Terminated
from cbam.app.terminal import show, silence
from cbam.errors import CBAMError, MissingExtraError
from cbam.train.launch import place

# Command name -> module in cbam/app/commands.
COMMANDS = {
    "compare": "compare",
    "train": "train",
    "eval": "evaluate",
    "recipes": "recipes",
    "study": "study",
    "list": "networks",
    "sites": "sites",
    "look": "look",
    "serve": "serve",
    "bench": "bench",
    "export": "export",
    "data": "data",
}

EXIT_CODES = """\
exit codes: 0 done, 1 unexpected error, 2 usage, 3 data, 4 weights file or checkpoint, 5 loss not finite,
6 out of memory, 7 disk full or no permission, 8 optional package missing, 9 one of several processes gone,
10 not exportable, 75 time limit, 130 interrupted, 143 terminated. After 75, 130 and 143, `cbam train ...
--resume auto` continues from the checkpoint that was saved."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; an error is one line on stderr, unless `--debug`."""
    code = _run(argv)
    if _is_one_of_several():
        # The process group has its own threads, for which the interpreter could wait forever at exit.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    return code


def _is_one_of_several() -> bool:
    with contextlib.suppress(CBAMError):
        return place() is not None
    return False


def _run(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            options = parse(argv)
            options.argv = argv
            return options.run(options)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit as stop:  # how argparse ends --help and --version
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        silence(sys.stdout)
        return 0
    except BaseException as error:
        return _fail(error, debug="--debug" in argv)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line; `run` of the result is the command's function.

    Raises:
        ConfigError: an unknown command or option; the message suggests the nearest one.
    """
    parser = Parser(
        prog="cbam", description="Channel and spatial attention for any CNN in PyTorch.", allow_abbrev=False
    )
    parser.epilog, parser.formatter_class = EXIT_CODES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"cbam {cbam.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for name, module in COMMANDS.items():
        command = importlib.import_module(f"cbam.app.commands.{module}")
        text = command.HELP
        own = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        own.allow_abbrev = False
        own.set_defaults(run=command.run)
        command.add(own)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    if not hasattr(options, "run"):
        parser.error(f"expected a command: {', '.join(COMMANDS)}")
    return options


def _fail(error: BaseException, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        # If Ctrl-C interrupts an exec() of text (dataclasses use it on import), CPython records it as
        # uncaught, and `python -m` ends with the signal, whatever its exit code. Another exec() resets that.
        exec("")
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        error = MissingExtraError.torch()
    if not _reported_elsewhere(error):
        with contextlib.suppress(OSError):  # with a full disk, only the exit code remains
            show(f"cbam: {_one_line(error)}", sys.stderr)
    return _exit_code(error)


def _reported_elsewhere(error: BaseException) -> bool:
    """Whether another process of the run reports the error: see cbam/train/distributed.py."""
    here = None
    with contextlib.suppress(CBAMError):
        here = place()
    return getattr(error, "silent", here is not None and here.rank > 0)


def _one_line(error: BaseException) -> str:
    if isinstance(error, Terminated):
        return "terminated"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    message = " ".join(str(error).split())
    if isinstance(error, CBAMError):
        return message
    if _is_out_of_memory(error):
        return f"out of memory; a smaller --batch-size needs less ({message[:200]})"
    return f"{type(error).__name__}: {message} (--debug shows the traceback)"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, CBAMError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, Terminated) else 130
    if _is_out_of_memory(error):
        return 6
    no_room = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
    return 7 if isinstance(error, OSError) and error.errno in no_room else 1


def _is_out_of_memory(error: BaseException) -> bool:
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
