"""`cbam data`."""

import argparse
import sys

from cbam.app.options import Parser, need, terminable
from cbam.app.terminal import Counter, progress, show

HELP = "say everything that is wrong with a data set"


def add(parser: Parser) -> None:
    """The options."""
    parser.add_argument("action", choices=("check",), metavar="check", help="check: print every fault")
    parser.add_argument(
        "data", metavar="DIR", help="class folders of pictures, parquet files, a COCO or a VOC folder"
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="decode every picture, too, and look for files in both parts or in two classes",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that look at pictures")


def run(options: argparse.Namespace) -> int:
    """A line per fault, with file and line; 3 if there is one."""
    need("cbam data check", {"vision": ("numpy", "PIL")})
    from cbam.data.check import check

    with terminable(), progress(beside=sys.stderr) as watch:
        kind, findings = check(
            options.data, deep=options.deep, workers=options.workers, passed=Counter(watch).passed
        )
        count = repaired = 0
        for finding in findings:
            watch.say(str(finding))
            count += finding.times
            repaired += finding.times if finding.counted else 0
    if not count:
        show(
            f"{options.data}: {kind}, no faults" + ("" if options.deep else " (--deep decodes every picture)")
        )
        return 0
    told = f"{count} fault{'s' * (count > 1)}, {repaired} of them repaired when it is read"
    show(f"{options.data}: {kind}, {told}")
    return 3
