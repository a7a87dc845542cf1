"""`cbam sites`."""

import argparse

from cbam.app.options import Parser
from cbam.app.terminal import show

HELP = "show where attention goes in a network, and why not elsewhere"


def add(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("name", metavar="NAME", help="network, see `cbam list`")


def run(options: argparse.Namespace) -> int:
    """Print one line per residual block."""
    import torch

    from cbam.models import build
    from cbam.surgery import sites

    with torch.device("cpu"):
        found = sites(build(options.name))
    if not found:
        show(f"{options.name} has no suitable residual block; choose places with `where` of cbam.attach")
    width = max((len(site.name) for site in found), default=0)
    for site in found:
        channels = "" if site.channels is None else f"{site.channels:>5} channels"
        taken = "attached" if site.attached else "attention" if site.default else "left out"
        show(f"{site.name:<{width}}  {channels:>14}  {taken}: {site.why}")
    return 0
