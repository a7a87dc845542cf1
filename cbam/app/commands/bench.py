"""`cbam bench`."""

import argparse
import dataclasses
from pathlib import Path

from cbam.app.options import Parser, add_setting, given, need, terminable
from cbam.app.terminal import show
from cbam.studies.bench.settings import Bench

HELP = "measure the cost of attention here, against plain networks and other implementations"
EXTRAS = {"vision": ("torchvision", "timm"), "train": ("pytorch_lightning",)}


def add(parser: Parser) -> None:
    """Add the options: the fields of Bench, and where the rows are written."""
    for field in dataclasses.fields(Bench):
        add_setting(parser, field)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the options above")
    parser.add_argument(
        "--out", metavar="DIR", help="write the rows as CSV to this folder (default: print only)"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, and print one line per case."""
    settings = Bench(**given(options, Bench))
    need("cbam bench", EXTRAS)
    from cbam.studies.bench.rows import Rows
    from cbam.studies.bench.run import benchmark

    rows = None if options.out is None else Rows(Path(options.out), quick=settings.quick)
    try:
        with terminable():
            benchmark(settings, show, rows and rows.add)
    finally:
        if rows is not None and rows.path is not None:
            show(f"Rows: {rows.path}")
    return 0
