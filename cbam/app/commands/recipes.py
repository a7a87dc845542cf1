"""`cbam recipes`."""

import argparse

from cbam.app.options import Parser
from cbam.app.terminal import show
from cbam.train.recipes import RECIPES

HELP = "list the recipes of `cbam train`"


def add(parser: Parser) -> None:
    """The command has no options."""


def run(options: argparse.Namespace) -> int:
    """Print two lines per recipe."""
    width = max(map(len, RECIPES)) + 2
    for name, recipe in RECIPES.items():
        config = recipe()
        rate = f"{config.optimizer} lr {config.lr:g} {config.schedule}, weight decay {config.weight_decay:g}"
        show(f"{name:<{width}}{(recipe.__doc__ or '').partition(chr(10))[0]}")
        show(f"{'':<{width}}{config.model}, {config.epochs} epochs, batch {config.batch_size}, {rate}")
    return 0
