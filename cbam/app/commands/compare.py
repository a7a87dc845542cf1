"""`cbam compare`."""

import argparse
import dataclasses

from cbam.app.options import Parser, add_setting, given, need, terminable
from cbam.app.terminal import progress, show
from cbam.studies.settings import Settings

HELP = "train a network with and without attention, and report the difference"
OUT = "cbam-report"
EXTRAS = {
    "train": ("torchvision", "PIL", "sklearn", "pytorch_lightning"),
    "explain": ("torchcam", "matplotlib"),
}


def add(parser: Parser) -> None:
    """Add the options: the fields of Settings, and the report folder."""
    for field in dataclasses.fields(Settings):
        add_setting(parser, field)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the options above; the command line takes precedence",
    )
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"report folder (default: {OUT})")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report there")


def run(options: argparse.Namespace) -> int:
    """Run the comparison and print the table."""
    settings = Settings(**given(options, Settings))
    need("cbam compare", EXTRAS)
    from cbam.studies import compare
    from cbam.studies.folder import PAGE, ReportFolder
    from cbam.studies.report import text

    folder = ReportFolder(options.out, overwrite=options.overwrite)
    try:
        with terminable(), progress() as watch:
            results = compare(settings, folder, watch=watch)
    except BaseException:
        if (folder.path / PAGE).exists() and folder.wrote:
            show(f"The finished part of the report: {folder.path / PAGE}")
        raise
    show("")
    show(text(results))
    show(f"\nReport: {folder.path / PAGE}")
    return 0
