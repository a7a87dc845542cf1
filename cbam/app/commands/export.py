"""`cbam export`."""

import argparse
from pathlib import Path

from cbam.app.options import Parser, count, need, terminable
from cbam.app.terminal import show
from cbam.errors import ConfigError

HELP = "write a network as a file for torch.export, ONNX or OpenVINO, checked against PyTorch"
SUFFIX = {"torch": ".pt2", "onnx": ".onnx", "openvino": ".xml"}
EXTRAS = {
    "torch": {},
    "onnx": {"export": ("onnx", "onnxscript", "onnxruntime")},
    "openvino": {"export": ("onnx", "onnxscript", "openvino")},
}


def add(parser: Parser) -> None:
    """The options."""
    parser.epilog = (
        "The file is run against PyTorch on three inputs before it is put in place: values agree to 1e-5 of "
        "the largest, classes are the same. It takes pictures as the network does, normalised; mean, "
        "standard deviation and class names are told in the file."
    )
    parser.add_argument(
        "source",
        metavar="NAME|FILE",
        help="network, see `cbam list`; a run of `cbam train` or its checkpoint, a folder of "
        "save_pretrained, or weights with --model",
    )
    parser.add_argument("--to", required=True, choices=SUFFIX, help="the format")
    parser.add_argument("--model", metavar="NAME", help="network of a weights file")
    parser.add_argument("--num-classes", type=count, metavar="N", help="of NAME or --model (default: 1000)")
    parser.add_argument("--dynamic", action="store_true", help="leave batch, height and width free")
    parser.add_argument(
        "--size", type=count, metavar="PIXELS", help="side of the input (default: as trained, or 224)"
    )
    parser.add_argument("--batch", type=count, default=1, metavar="N", help="pictures at once (default: 1)")
    parser.add_argument("--opset", type=count, metavar="N", help="of ONNX (default: the exporter's)")
    parser.add_argument("--out", metavar="PATH", help="the file (default: the name with the format's ending)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(options: argparse.Namespace) -> int:
    """Export, and say how far the file agrees with the network."""
    need(f"cbam export --to {options.to}", EXTRAS[options.to])
    try:
        out = Path(options.out) if options.out else Path(_stem(options.source) + SUFFIX[options.to])
        exists = out.exists()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{options.source:.80}: {getattr(error, 'strerror', error)}") from error
    if exists and not options.overwrite:
        raise ConfigError(f"{out} exists: give another --out, or --overwrite")
    from cbam.app.source import source
    from cbam.portable import export

    with terminable():
        found = source(options.source, options.model, options.num_classes)
        show(found.told)
        size = options.size or found.size
        made = export(
            found.network, out, to=options.to, shape=(options.batch, 3, size, size), dynamic=options.dynamic,
            opset=options.opset, about=found.about, overwrite=options.overwrite,
        )  # fmt: skip
    agreed = made.agreement
    shapes = ", ".join("x".join(map(str, shape)) for shape in sorted({*agreed.shapes}))
    show(
        f"{made.path} ({made.size / 1e6:.1f} MB): differs from PyTorch by {agreed.difference:.1e} "
        f"of the largest value at most, names the same classes; checked at {shapes}"
    )
    return 0


def _stem(source: str) -> str:
    path = Path(source)
    return (path.resolve().name if path.is_dir() else path.stem if path.is_file() else source).replace(
        ":", "-"
    )
