"""`cbam serve`."""

import argparse

from cbam.app.commands.look import EXTRAS, add_networks
from cbam.app.options import Parser, count, need, terminable
from cbam.app.terminal import show

HELP = "serve a local web page that shows where networks look in an image"


def add(parser: Parser) -> None:
    """Add the options."""
    add_networks(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen on (default: 127.0.0.1, only this machine)",
    )
    parser.add_argument(
        "--port", type=_port, default=7860, metavar="N", help="port to listen on (default: 7860)"
    )


def _port(text: str) -> int:
    if (number := count(text)) > 65535:
        raise argparse.ArgumentTypeError(f"must be 1 to 65535, got {text!r}")
    return number


def run(options: argparse.Namespace) -> int:
    """Serve until interrupted."""
    need("cbam serve", {**EXTRAS, "demo": ("gradio",)})
    from cbam.app.networks import viewer
    from cbam.app.serve import serve

    with terminable():
        networks = viewer(
            options.model, options.weights, options.compare, options.classes, options.size,
            mean=options.mean, std=options.std,
        )  # fmt: skip
        serve(networks, host=options.host, port=options.port, say=show)
    return 0
