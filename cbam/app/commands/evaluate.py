"""`cbam eval`."""

import argparse
from pathlib import Path

from cbam.app.commands.train import EXTRAS, to_start, uses_cuda
from cbam.app.options import Parser, count, need, terminable
from cbam.app.terminal import show
from cbam.train.launch import launch, place

HELP = "evaluate a checkpoint, a folder for the hub, or weights of a named network"


def add(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="checkpoint or folder of a run, folder for the hub, or weights file with --model",
    )
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="image folder (default: that of the run). Scores its val/; without train/ and val/, all images, "
        "or those that were held out if the run was trained on this folder",
    )
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="for any folder of classes, score only the images that training on it would hold out",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="network of a weights file, see `cbam list`; not needed for a checkpoint",
    )
    parser.add_argument("--size", type=count, metavar="PIXELS", help="side of the images, in pixels")
    parser.add_argument(
        "--batch-size", type=count, metavar="N", help="images per batch (default: 256; for a detector 8)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--devices", type=count, default=1, metavar="N", help="processes that share the work (default: 1)"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images")


def run(options: argparse.Namespace) -> int:
    """Evaluate, and print the scores."""
    need("cbam eval", EXTRAS)
    if (processes := to_start({"devices": options.devices})) > 1:
        return launch(options.argv, processes)
    from cbam.train import score
    from cbam.train.distributed import joined

    here = place()
    with terminable(), joined(here, cuda=uses_cuda({"device": options.device})):
        scored, what = score(
            Path(options.file), data=options.data, model=options.model, size=options.size,
            batch_size=options.batch_size, device=options.device, workers=options.workers,
            held_out=options.held_out,
        )  # fmt: skip
    if here is None or here.rank == 0:
        show(f"{what}: {scored}")
    return 0
