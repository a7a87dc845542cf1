"""`cbam recipes`."""

import argparse

from cbam.app.options import Parser
from cbam.app.terminal import show
from cbam.train.recipes import RECIPES

HELP = "list the recipes of `cbam train`"


def add(parser: Parser) -> None:
    """It has no options."""


def run(options: argparse.Namespace) -> int:
    """Two lines per recipe."""
    for name, recipe in RECIPES.items():
        config = recipe()
        show(f"{name:<16}{(recipe.__doc__ or '').partition(chr(10))[0]}")
        show(
            f"{'':<16}{config.model}, {config.epochs} epochs, batch {config.batch_size}, {config.optimizer} "
            f"lr {config.lr:g} {config.schedule}, weight decay {config.weight_decay:g}"
        )
    return 0
