"""`cbam data`."""

import argparse
import sys

from cbam.app.options import Parser, need, terminable
from cbam.app.terminal import Counter, progress, show

HELP = "check a data set, and report every fault"


def add(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("action", choices=("check",), metavar="check", help="report every fault")
    parser.add_argument(
        "data",
        metavar="DIR",
        help="image folder with one folder per class, parquet files, or a COCO or VOC folder",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="also decode every image, and look for files that are in both parts or in two classes",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images")


def run(options: argparse.Namespace) -> int:
    """Print one line per fault, with file and line; returns 3 if there is any."""
    need("cbam data check", {"vision": ("numpy", "PIL")})
    from cbam.data.check import check

    with terminable(), progress(line_stream=sys.stderr) as watch:
        kind, findings = check(
            options.data, deep=options.deep, workers=options.workers, passed=Counter(watch).passed
        )
        count = repaired = 0
        for finding in findings:
            watch.say(str(finding))
            count += finding.times
            repaired += finding.times if finding.counted else 0
    if not count:
        show(f"{options.data}: {kind}, no faults" + ("" if options.deep else " (--deep decodes every image)"))
        return 0
    summary = f"{count} fault{'s' * (count > 1)}, {repaired} of them repaired on reading"
    show(f"{options.data}: {kind}, {summary}")
    return 3
