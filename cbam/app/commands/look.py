"""`cbam look`."""

import argparse
from pathlib import Path

from cbam.app.options import Parser, add_normalisation, count, need, share, terminable
from cbam.app.terminal import counted, progress, show
from cbam.errors import ConfigError, DataError

HELP = "show where networks look in your images, with and without attention"
OUT = "cbam-look"
THRESHOLD = 0.5
METHODS = ("gradcam", "gradcam++", "layercam", "scorecam")
EXTRAS = {"explain": ("torchvision", "timm", "PIL", "safetensors", "torchcam", "matplotlib")}


def add(parser: Parser) -> None:
    """Add the options."""
    parser.epilog = (
        "Without --weights or --compare the networks are EfficientNet-Lite0, plain and with CBAM. "
        "cbam[explain] installs their weights; nothing is downloaded."
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="images, or folders of images (drawn as contact sheets)"
    )
    add_networks(parser)
    parser.add_argument(
        "--target",
        metavar="CLASS",
        help="show the evidence for this class, by name or number (default: the first network's prediction)",
    )
    parser.add_argument(
        "--method", choices=METHODS, help="how the maps are made (default: gradcam; with --detect layercam)"
    )
    parser.add_argument("--layer", metavar="NAME", help="layer of the maps (default: the last feature map)")
    parser.add_argument(
        "--score", metavar="DATA",
        help="measure how well the maps find objects: a folder of VOC XML, a COCO .json, a .csv, or, with "
        "your own networks, digits",
    )  # fmt: skip
    parser.add_argument(
        "--gates", metavar="DATA",
        help="summarise what the gates do over a set of images: an image folder, a folder per class, or, "
        "with your own networks, digits",
    )  # fmt: skip
    parser.add_argument("--label", metavar="NAME", help="with --score: only the boxes with this label")
    parser.add_argument(
        "--limit", type=count, metavar="N", help="with --score and --gates: use N images, evenly spaced"
    )
    add_detection(parser)
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"folder of the figures (default: {OUT})")


def add_detection(parser: Parser) -> None:
    """Add the options for detectors."""
    parser.add_argument(
        "--detect", action="store_true",
        help="for detectors (--model fasterrcnn:resnet50): draw their boxes, and the evidence for one",
    )  # fmt: skip
    parser.add_argument(
        "--box", type=count, metavar="N", help="with --detect: the box to show the evidence for (default: 1)"
    )
    parser.add_argument(
        "--threshold", type=share, metavar="SCORE",
        help=f"with --detect: the lowest score of a box (default: {THRESHOLD})",
    )  # fmt: skip


def add_networks(parser: Parser) -> None:
    """Add the options that choose the networks."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="network of weights files, see `cbam list`; not needed for a checkpoint",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="weights for --model, a run of `cbam train`, or a folder of save_pretrained",
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="NAME=FILE",
        help="several networks side by side: plain=FILE cbam=FILE",
    )  # fmt: skip
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line (default: ImageNet's)")
    parser.add_argument("--size", type=count, metavar="PIXELS", help="side of the network input, in pixels")
    add_normalisation(parser)


def run(options: argparse.Namespace) -> int:
    """Run the chosen analyses and print which files were written."""
    _check(options)
    need("cbam look", EXTRAS)
    for path in map(Path, options.images):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    with terminable():
        unreadable = _detect(options) if options.detect else _look_and_measure(options)
    if unreadable:
        raise DataError(unreadable)
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.gates and not (options.images or options.score) and (options.layer or options.method):
        raise ConfigError("--layer and --method apply to maps, and --gates alone draws none: omit them")
    options.method = options.method or ("layercam" if options.detect else "gradcam")
    measured = options.score or options.gates
    if not options.images and not measured:
        raise ConfigError("cbam look needs images: cbam look photo.jpg")
    if (options.label and not options.score) or (options.limit and not measured):
        raise ConfigError("--label needs --score, and --limit needs --score or --gates")
    if options.target is not None and not options.images:
        raise ConfigError("--target needs images; --score uses the class of each label")
    if options.detect and (measured or options.target is not None):
        raise ConfigError("--detect excludes --score, --gates and --target; choose an object with --box")
    if options.detect and (options.mean or options.std):
        raise ConfigError("--mean and --std are for classifiers: detectors normalise images themselves")
    if not options.detect and (options.box or options.threshold is not None):
        raise ConfigError("--box and --threshold need --detect")


def _look_and_measure(options: argparse.Namespace) -> str:
    from cbam.app.networks import viewer

    networks = viewer(
        options.model, options.weights, options.compare, options.classes, options.size,
        digits="digits" in (options.score, options.gates), mean=options.mean, std=options.std,
    )  # fmt: skip
    for line in networks.about:
        show(line)
    unreadable = _look(options, networks) if options.images else ""
    if options.score:
        _score(options, networks)
    if options.gates:
        _gates(options, networks)
    return unreadable


def _look(options: argparse.Namespace, networks) -> str:
    """Draw the figures; returns a message about unreadable images, or an empty string."""
    from cbam.app.look import FIGURES, EarlierFiles, LookRequest, look_at

    paths, out = [Path(path) for path in options.images], Path(options.out)
    earlier = EarlierFiles(out)
    request = LookRequest(paths, out, options.target, options.method, options.layer)
    return _report(look_at(networks, request, show), earlier, FIGURES)


def _detect(options: argparse.Namespace) -> str:
    """Draw what the detectors find; returns a message about unreadable images, or an empty string."""
    from cbam.app.detecting import FIGURES, DetectRequest, detectors, look_for_objects
    from cbam.app.look import EarlierFiles

    networks = detectors(options.model, options.weights, options.compare, options.classes, options.size)
    for line in networks.about:
        show(line)
    request = DetectRequest(
        [Path(path) for path in options.images],
        Path(options.out),
        options.box or 1,
        THRESHOLD if options.threshold is None else options.threshold,
        options.method,
        options.layer,
    )
    earlier = EarlierFiles(request.out)
    return _report(look_for_objects(networks, request, show), earlier, FIGURES)


def _report(outcome, earlier, pattern: str) -> str:
    show("")
    for path in outcome.figures:
        show(earlier.describe(path))
    if left := earlier.leftovers(outcome.figures, pattern):
        show(left)
    count = len(outcome.unreadable)
    return f"{count} of {counted(outcome.processed + count, 'image')} left out" if count else ""


def _score(options: argparse.Namespace, networks) -> None:
    from cbam.app.look import EarlierFiles
    from cbam.app.score import markdown, score, write

    with progress() as watch:
        results = score(
            networks, options.score, watch, method=options.method, layer=options.layer, limit=options.limit,
            label=options.label,
        )  # fmt: skip
    show("")
    show(markdown(results))
    earlier = EarlierFiles(Path(options.out))
    for path in write(results, Path(options.out)):
        show(earlier.describe(path))


def _gates(options: argparse.Namespace, networks) -> None:
    from cbam.app.gates import gates
    from cbam.app.look import EarlierFiles

    earlier = EarlierFiles(Path(options.out))
    with progress() as watch:
        written = gates(networks, options.gates, Path(options.out), watch, limit=options.limit)
    for path in written:
        show(earlier.describe(path))
