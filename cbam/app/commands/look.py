"""`cbam look`."""

import argparse
from pathlib import Path

from cbam.app.options import Parser, count, need, terminable
from cbam.app.terminal import show
from cbam.errors import ConfigError, DataError

HELP = "show what networks look at in your pictures, with and without attention"
OUT = "cbam-look"
METHODS = ("gradcam", "gradcam++", "layercam", "scorecam")
EXTRAS = {"explain": ("torchvision", "timm", "PIL", "safetensors", "torchcam", "matplotlib")}


def add(parser: Parser) -> None:
    """The options."""
    parser.epilog = (
        "Without --weights or --compare it looks with EfficientNet-Lite0, plain and with CBAM; their weights "
        "are installed with cbam[explain], nothing is downloaded."
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="pictures, or folders of them (a contact sheet)"
    )
    add_networks(parser)
    parser.add_argument(
        "--target", metavar="CLASS", help="show the evidence for this class, by name or number"
    )
    parser.add_argument("--method", default="gradcam", choices=METHODS, help="(default: gradcam)")
    parser.add_argument("--layer", metavar="NAME", help="layer of the maps (default: the last feature map)")
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"folder of the figures (default: {OUT})")


def add_networks(parser: Parser) -> None:
    """The options that say which networks."""
    parser.add_argument(
        "--model", metavar="NAME", help="network, see `cbam list`; a checkpoint knows its own"
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="weights of --model, or a checkpoint of `cbam train`"
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="NAME=FILE",
        help="networks side by side: plain=FILE cbam=FILE",
    )  # fmt: skip
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line (default: ImageNet's)")
    parser.add_argument("--size", type=count, metavar="PIXELS", help="side of what the networks see")


def run(options: argparse.Namespace) -> int:
    """Look, and say what was written."""
    if not options.images:
        raise ConfigError("cbam look needs pictures: cbam look photo.jpg")
    need("cbam look", EXTRAS)
    from cbam.app.look import Wanted, look_at
    from cbam.app.networks import viewer

    for path in map(Path, options.images):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    with terminable():
        eyes = viewer(options.model, options.weights, options.compare, options.classes, options.size)
        for line in eyes.about:
            show(line)
        wanted = Wanted(
            [Path(p) for p in options.images],
            Path(options.out),
            options.target,
            options.method,
            options.layer,
        )
        told = look_at(eyes, wanted, show)
    show("")
    for path in told.figures:
        show(str(path))
    if told.unreadable:
        raise DataError(
            f"{len(told.unreadable)} of {told.looked + len(told.unreadable)} pictures were left out"
        )
    return 0
