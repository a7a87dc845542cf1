"""The command `cbam`.

Made on argparse: it answers `--help` in a few hundredths of a second and needs nothing installed, where
jsonargparse alone takes a quarter of a second to import. torch is imported inside the commands.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cbam
from cbam.app.config import read_config, wanted
from cbam.app.terminal import progress, show, silence
from cbam.errors import CBAMError, ConfigError, MissingExtraError
from cbam.studies.settings import Settings
from cbam.train.recipes import RECIPES, Config

EXIT_CODES = """\
exit codes: 0 done, 1 unexpected error, 2 usage, 3 data, 4 weights file or checkpoint, 5 loss not finite,
6 out of memory, 7 no room or no permission, 8 optional package missing, 75 time limit, 130 interrupted,
143 terminated; what `cbam train` saved before 75, 130 or 143 is taken up by --resume auto"""

OUT, RUNS = "cbam-report", "cbam-runs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; an error is one line on stderr, unless `--debug`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            options = _parse(argv)
            return options.run(options)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit as stop:  # argparse's way to end
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        silence(sys.stdout)
        return 0
    except BaseException as error:
        return _fail(error, debug="--debug" in argv)


def _fail(error: BaseException, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    show(f"cbam: {_one_line(error)}", sys.stderr)
    return _exit_code(error)


def _one_line(error: BaseException) -> str:
    if isinstance(error, _Terminated):
        return "terminated"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    told = " ".join(str(error).split())
    if isinstance(error, CBAMError):
        return told
    if _is_out_of_memory(error):
        return f"out of memory; a smaller --batch-size needs less ({told[:200]})"
    return f"{type(error).__name__}: {told} (--debug shows where)"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, CBAMError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, _Terminated) else 130
    if _is_out_of_memory(error):
        return 6
    no_room = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
    return 7 if isinstance(error, OSError) and error.errno in no_room else 1


def _is_out_of_memory(error: BaseException) -> bool:
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ends like Ctrl-C, so that what is finished is reported."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Raise SIGTERM as `_Terminated` inside the block."""

    def terminate(*_) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


# --- the commands ---


def _compare(options: argparse.Namespace) -> int:
    settings = _settings(options)
    _need(
        "cbam compare",
        {
            "train": ("torchvision", "PIL", "sklearn", "pytorch_lightning"),
            "explain": ("torchcam", "matplotlib"),
        },
    )
    from cbam.studies import compare
    from cbam.studies.folder import PAGE, ReportFolder
    from cbam.studies.report import text

    folder = ReportFolder(options.out, overwrite=options.overwrite)
    try:
        with _terminable(), progress() as watch:
            results = compare(settings, folder, watch=watch)
    except BaseException:
        if (folder.path / PAGE).exists() and folder.wrote:
            show(f"What was finished is in {folder.path / PAGE}")
        raise
    show("")
    show(text(results))
    show(f"\nReport: {folder.path / PAGE}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from cbam.models import names

    found = names(options.pattern)
    if not found:
        near = difflib.get_close_matches(options.pattern, names(), 3, 0.0)
        raise ConfigError(f"no network matches {options.pattern!r}; nearest: {', '.join(near)}")
    for name in found:
        show(name)
    return 0


def _sites(options: argparse.Namespace) -> int:
    import torch

    from cbam.models import build
    from cbam.surgery import sites

    with torch.device("cpu"):
        found = sites(build(options.name))
    if not found:
        show(f"{options.name} has no residual block for attention; cbam.attach takes other places by `where`")
    width = max((len(site.name) for site in found), default=0)
    for site in found:
        channels = "-" if site.channels is None else str(site.channels)
        taken = "attached" if site.attached else "attention" if site.default else "left out"
        show(f"{site.name:<{width}}  {channels:>5} channels  {taken}: {site.why}")
    return 0


def _train(options: argparse.Namespace) -> int:
    settings = _given(options, Config)
    settings.pop("recipe", None)
    _need("cbam train", {"train": ("torchvision", "PIL", "sklearn", "pytorch_lightning")})
    from cbam.train import run

    folder = _run_folder(options)
    with _terminable(), progress() as watch:
        history = run(
            options.recipe, settings, folder, watch, resume=options.resume, max_time=options.max_time
        )
    last = history[-1]
    show(f"Done: top-1 error {last['val_top1']:.2f} %, validation loss {last['val_loss']:.4f}; in {folder}")
    return 0


def _run_folder(options: argparse.Namespace) -> Path:
    if options.out is not None:
        return Path(options.out)
    if options.resume not in (None, "auto"):
        path = Path(options.resume)
        return path if path.is_dir() else path.parent
    return Path(RUNS) / options.recipe.replace("/", "-")


def _evaluate(options: argparse.Namespace) -> int:
    _need("cbam eval", {"train": ("torchvision", "PIL", "sklearn", "pytorch_lightning")})
    from cbam.train import score

    with _terminable():
        scored, what = score(
            Path(options.file), data=options.data, model=options.model, size=options.size,
            batch_size=options.batch_size, device=options.device, workers=options.workers,
        )  # fmt: skip
    top5 = "" if scored.top5 is None else f", top-5 error {scored.top5:.2f} %"
    show(f"{what}: top-1 error {scored.top1:.2f} %{top5}, loss {scored.loss:.4f}")
    return 0


def _recipes(options: argparse.Namespace) -> int:
    for name, recipe in RECIPES.items():
        config = recipe()
        show(f"{name:<16}{(recipe.__doc__ or '').partition(chr(10))[0]}")
        show(
            f"{'':<16}{config.model}, {config.epochs} epochs, batch {config.batch_size}, {config.optimizer} "
            f"lr {config.lr:g} {config.schedule}, weight decay {config.weight_decay:g}"
        )
    return 0


# --- the command line ---


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors and the nearest option for a misspelt one."""

    def error(self, message: str):
        raise ConfigError(f"{message} (see `{self.prog} --help`)")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        found, left = super().parse_known_args(args, namespace)
        for argument in left:
            if argument.startswith("-"):
                self.error(f"unknown option {argument}{self._hint(argument)}")
        return found, left

    def _hint(self, argument: str) -> str:
        near = difflib.get_close_matches(argument.partition("=")[0], self._option_string_actions, 1, 0.5)
        return f"; did you mean {near[0]}?" if near else ""


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="cbam", description="What-and-where attention for any PyTorch CNN.", allow_abbrev=False
    )
    parser.epilog, parser.formatter_class = EXIT_CODES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"cbam {cbam.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    debug = _Parser(add_help=False, allow_abbrev=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_compare(commands, debug)
    _add_train(commands, debug)
    _add_evaluate(commands, debug)
    _add(commands, debug, "recipes", _recipes, "list the recipes of `cbam train`")
    listing = _add(commands, debug, "list", _list, "list the networks that can be built")
    listing.add_argument(
        "pattern", nargs="?", default="", metavar="PATTERN", help='part of a name, or "resnet*"'
    )
    places = _add(
        commands, debug, "sites", _sites, "show where attention goes in a network, and why not elsewhere"
    )
    places.add_argument("name", metavar="NAME", help="network, see `cbam list`")
    options = parser.parse_args(argv)
    if not hasattr(options, "run"):
        parser.error("a command is needed: compare, train, eval, recipes, list or sites")
    return options


def _add(commands, debug, name: str, run, help: str) -> _Parser:
    parser = commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".", parents=[debug]
    )
    parser.allow_abbrev = False
    parser.set_defaults(run=run)
    return parser


def _add_compare(commands, debug) -> None:
    parser = _add(
        commands,
        debug,
        "compare",
        _compare,
        "train a network with and without attention and report what it brought",
    )
    for field in dataclasses.fields(Settings):
        _add_setting(parser, field)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with options above; the command line wins"
    )
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"report folder (default: {OUT})")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report in it")


def _add_train(commands, debug) -> None:
    parser = _add(
        commands, debug, "train", _train, "train a network by a recipe; a stopped run can be resumed"
    )
    parser.add_argument("recipe", metavar="RECIPE", help=f"one of {', '.join(RECIPES)}")
    for field in dataclasses.fields(Config):
        if field.name != "recipe":
            _add_setting(parser, field, of_recipe=True)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with options above, as config.json of a run"
    )
    parser.add_argument("--out", metavar="DIR", help=f"folder of the run (default: {RUNS}/RECIPE)")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="go on from the newest valid checkpoint of the folder, if it has one, or from this one",
    )
    parser.add_argument(
        "--max-time",
        type=_duration,
        metavar="TIME",
        help="save and exit with 75 before this time is over: 90m, 11.5h, 11:30:00",
    )


def _add_evaluate(commands, debug) -> None:
    parser = _add(
        commands, debug, "eval", _evaluate, "evaluate a checkpoint, or the weights of a named network"
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint or folder of a run, or weights with --model")
    parser.add_argument("data", nargs="?", metavar="DATA", help="image folder (default: that of the run)")
    parser.add_argument(
        "--model", metavar="NAME", help="network, see `cbam list`; a checkpoint knows its own"
    )
    parser.add_argument("--size", type=_count, metavar="PIXELS", help="side of the pictures")
    parser.add_argument("--batch-size", type=_count, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load pictures")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _duration(text: str) -> float:
    """Seconds: "90s", "90m", "11.5h" or "H:MM:SS"."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text):
        seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
    elif match := re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", text):
        seconds = 3600.0 * int(match[1]) + 60 * int(match[2]) + int(match[3])
    else:
        raise argparse.ArgumentTypeError(f"must be a time such as 90m, 11.5h or 11:30:00, got {text!r}")
    return seconds


def _add_setting(parser: _Parser, field: dataclasses.Field, *, of_recipe: bool = False) -> None:
    """An option for a field. Its default stays out, so that what was given can be told."""
    how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field, of_recipe)}
    if field.name == "data":
        parser.add_argument("data", nargs="?", metavar="DATA", **how)
        return
    flag = "--" + field.name.replace("_", "-")
    if field.type is bool:
        parser.add_argument(flag, action="store_true", **how)
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
            raise argparse.ArgumentTypeError(f"must be {wanted(field)}, got {text!r}") from None

    return read


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(**_given(options, Settings))


def _given(options: argparse.Namespace, kind: type[Settings] | type[Config]) -> dict[str, Any]:
    """What the file of --config says, and over it the command line."""
    given: dict[str, Any] = read_config(options.config, kind) if options.config else {}
    for name in kind.names():
        if hasattr(options, name):
            value = getattr(options, name)
            given[name] = tuple(value) if isinstance(value, list) else value
    return given


def _need(what: str, extras: dict[str, tuple[str, ...]]) -> None:
    """Refuse before any work when a package of these extras is not installed."""
    missing = {
        extra: [n for n in names if importlib.util.find_spec(n) is None] for extra, names in extras.items()
    }
    wanted_extras = ",".join(extra for extra, names in missing.items() if names)
    if wanted_extras:
        absent = ", ".join(name for names in missing.values() for name in names)
        raise MissingExtraError(f"{MissingExtraError.of(what, wanted_extras)} (missing: {absent})")
