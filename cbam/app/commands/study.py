"""`cbam study`."""

import argparse
import time

from cbam.app.options import Parser, count, duration, need, terminable
from cbam.app.terminal import counted, progress, show
from cbam.errors import StoppedError
from cbam.studies.study import PRECISIONS, SEEDS
from cbam.studies.tables import STUDIES

HELP = "fill tables of the paper: train the runs that have no record yet, and compute the tables"
OUT = "results"
EXTRAS = {"train": ("torchvision", "PIL", "sklearn", "pytorch_lightning")}
_CHANGES = ("network", "epochs", "batch_size", "lr", "warmup_epochs", "size", "limit", "precision", "regions")


def add(parser: Parser) -> None:
    """Add the options: which studies, on which data, how many runs, and changes to the usual training."""
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"{', '.join(STUDIES)} (default: list them)")
    parser.add_argument(
        "--dataset",
        default="digits",
        metavar="D",
        help="digits, or an image folder (default: digits); for the study coco a folder in COCO or Pascal "
        "VOC layout, for voc one in Pascal VOC layout",
    )
    parser.add_argument(
        "--seeds", type=count, default=SEEDS, metavar="N", help=f"repetitions of every row (default: {SEEDS})"
    )
    parser.add_argument("--arms", nargs="+", metavar="ROW", help="train only these rows")
    parser.add_argument(
        "--budget", type=duration, metavar="TIME", help="stop before this time is over: 90m, 11.5h"
    )
    parser.add_argument(
        "--out", default=OUT, metavar="DIR", help=f"parent of the folders of the studies (default: {OUT})"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--plan", action="store_true", help="print which runs are missing, and train nothing")
    mode.add_argument("--tables", action="store_true", help="recompute the tables, and train nothing")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images")
    parser.add_argument(
        "--commit", metavar="SHA", help="the commit of this code, if it is a copy without git"
    )
    unset = argparse.SUPPRESS  # the default depends on the data set
    parser.add_argument("--network", default=unset, metavar="NAME", help="network, see `cbam list`")
    parser.add_argument("--epochs", type=count, default=unset, metavar="N", help="epochs of a run")
    parser.add_argument("--batch-size", type=count, default=unset, metavar="N", help="images per step")
    parser.add_argument("--lr", type=float, default=unset, metavar="RATE", help="peak learning rate")
    parser.add_argument(
        "--warmup-epochs",
        type=float,
        default=unset,
        metavar="N",
        help="epochs in which the learning rate rises to --lr; 0: none",
    )
    parser.add_argument(
        "--size", type=count, default=unset, metavar="PIXELS", help="side of the images, in pixels"
    )
    parser.add_argument(
        "--limit",
        type=count,
        default=unset,
        metavar="N",
        help="use only about N training and N validation images",
    )
    parser.add_argument(
        "--regions", type=count, default=unset, metavar="N", help="regions per image for Faster R-CNN"
    )
    parser.add_argument("--precision", default=unset, metavar="NAME", help=f"one of {', '.join(PRECISIONS)}")


def run(options: argparse.Namespace) -> int:
    """Fill the studies one after another within the time budget, and print their tables."""
    if not options.name:
        return _list()
    need("cbam study", EXTRAS)
    options.name = list(dict.fromkeys(options.name))  # a study given twice is filled once
    from cbam.studies.conduct import as_text, find_study, write_tables
    from cbam.studies.records import Records

    folders = {name: (Records(options.out, name), find_study(name)) for name in options.name}
    left = 0
    if options.tables:
        for folder in folders.values():
            write_tables(*folder)
    else:
        left = _fill(options)
    if options.plan:
        return 0
    for records, study in folders.values():
        if table := as_text(records, study):
            show("")
            show(table)
            show(f"Records, tables and figures: {records.path}")
        else:
            show(f"No record of {study.name} in {records.path}")
    if left:
        raise StoppedError(f"{counted(left, 'run')} still without a record; repeat the command to continue")
    return 0


def _fill(options: argparse.Namespace) -> int:
    """Train the missing runs; returns how many are still left."""
    from cbam.studies.conduct import conduct, find_images, prepare

    changes = {name: getattr(options, name) for name in _CHANGES if hasattr(options, name)}
    end = None if options.budget is None else time.monotonic() + options.budget
    with terminable(), progress() as watch:
        pictures = find_images(options.dataset, changes, options.name)
        fillings = [
            prepare(
                name, pictures, changes, out=options.out, device=options.device, workers=options.workers,
                arms=options.arms, commit=options.commit, watch=watch,
            )
            for name in options.name
        ]  # fmt: skip
        for i, filling in enumerate(fillings):
            watch.say(filling.plan(options.seeds, fillings[:i]))
        if options.plan:
            return 0
        if fillings[0].origin["dirty"] is not False:
            watch.say(f"note: {_uncounted(fillings[0].origin)}; these runs will not count")
        for filling in fillings:
            budget = None if end is None else max(0.0, end - time.monotonic())
            conduct(filling, seeds=options.seeds, budget=budget, share=1 / len(fillings))
    for filling in fillings:
        for error in filling.failed.values():
            raise error  # already reported; the exit code is that of the first error
    return sum(len(filling.missing(options.seeds)) for filling in fillings)


def _uncounted(origin: dict) -> str:
    if origin["dirty"]:
        return "the code differs from its commit"
    return "the commit of this code is unknown (give --commit)"


def _list() -> int:
    for name, study in STUDIES.items():
        show(f"{name:<11}{study.title}: {len(study.arms)} rows")
        show(f"{'':<11}{', '.join(study.arms)}")
    return 0
