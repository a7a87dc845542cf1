"""`cbam list`."""

import argparse
import difflib

from cbam.app.options import Parser
from cbam.app.terminal import show
from cbam.errors import ConfigError

HELP = "list the networks that can be built"


def add(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument(
        "pattern", nargs="?", default="", metavar="PATTERN", help='part of a name, or "resnet*"'
    )


def run(options: argparse.Namespace) -> int:
    """Print one name per line."""
    from cbam.models import names

    found = names(options.pattern)
    if not found:
        near = difflib.get_close_matches(options.pattern, names(), 3, 0.0)
        raise ConfigError(f"no network matches {options.pattern!r}; nearest: {', '.join(near)}")
    for name in found:
        show(name)
    return 0
