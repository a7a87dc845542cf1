"""`cbam export`."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from cbam.app.options import Parser, add_normalisation, count, need, terminable
from cbam.app.terminal import show
from cbam.errors import ConfigError

if TYPE_CHECKING:
    from cbam.app.source import Source

HELP = "export a network for torch.export, ONNX or OpenVINO, or as a folder to share, with a model card"
SUFFIX = {"torch": ".pt2", "onnx": ".onnx", "openvino": ".xml", "hub": ""}
EXTRAS = {
    "torch": {},
    "onnx": {"export": ("onnx", "onnxscript", "onnxruntime")},
    "openvino": {"export": ("onnx", "onnxscript", "openvino")},
    "hub": {"vision": ("safetensors",)},
}


def add(parser: Parser) -> None:
    """Add the options."""
    parser.epilog = (
        "Before the file is put in place it is compared with PyTorch on three inputs: values must agree to "
        "1e-5 of the largest, and classes must be the same. The file takes normalised images, as the network "
        "does, and states mean, standard deviation and class names if they are known. --to hub writes a "
        "folder for cbam.from_pretrained and the Hugging Face Hub; for a run, its model card has the recipe "
        "and the results."
    )
    parser.add_argument(
        "source",
        metavar="NAME|FILE",
        help="network, see `cbam list`; a run of `cbam train` or its checkpoint; a folder of "
        "save_pretrained; or a weights file with --model",
    )
    parser.add_argument("--to", required=True, choices=SUFFIX, help="the format")
    parser.add_argument("--model", metavar="NAME", help="network of the weights file")
    parser.add_argument(
        "--num-classes", type=count, metavar="N", help="classes of NAME or --model (default: 1000)"
    )
    parser.add_argument("--dynamic", action="store_true", help="leave batch size, height and width free")
    parser.add_argument(
        "--size",
        type=count,
        metavar="PIXELS",
        help="side of the input, in pixels (default: as trained, or 224)",
    )
    add_normalisation(parser)
    parser.add_argument("--batch", type=count, metavar="N", help="batch size (default: 1)")
    parser.add_argument("--opset", type=count, metavar="N", help="ONNX opset (default: the exporter's)")
    parser.add_argument(
        "--licence", metavar="SPDX", help="licence of the weights, for the model card, such as mit"
    )
    parser.add_argument(
        "--out", metavar="PATH", help="output file (default: the name with the format's suffix)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(options: argparse.Namespace) -> int:
    """Export, and print how closely the file agrees with the network."""
    need(f"cbam export --to {options.to}", EXTRAS[options.to])
    try:
        out = Path(options.out) if options.out else Path(_stem(options.source) + SUFFIX[options.to])
        exists = out.exists()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{options.source:.80}: {getattr(error, 'strerror', error)}") from error
    if exists and not options.overwrite:
        raise ConfigError(f"{out} exists: give another --out, or --overwrite")
    _refuse_strangers(options)
    from cbam.app.source import source

    with terminable():
        found = source(options.source, options.model, options.num_classes, options.mean, options.std)
        show(found.description)
        show(_folder(found, out, options) if options.to == "hub" else _file(found, out, options))
    return 0


def _refuse_strangers(options: argparse.Namespace) -> None:
    """Refuse options that do not apply to the format."""
    of_files = {
        "--dynamic": options.dynamic,
        "--size": options.size,
        "--batch": options.batch,
        "--opset": options.opset,
    }
    strangers = of_files if options.to == "hub" else {"--licence": options.licence}
    if given := [name for name, value in strangers.items() if value]:
        raise ConfigError(f"--to {options.to} does not take {given[0]}: omit it")


def _file(found: "Source", out: Path, options: argparse.Namespace) -> str:
    from cbam.portable import export

    size = options.size or found.card.size
    made = export(
        found.network, out, to=options.to, shape=(options.batch or 1, 3, size, size), dynamic=options.dynamic,
        opset=options.opset, about=found.about(size), overwrite=options.overwrite,
    )  # fmt: skip
    agreed = made.agreement
    shapes = ", ".join("x".join(map(str, shape)) for shape in sorted({*agreed.shapes}))
    return (
        f"{made.path} ({made.size / 1e6:.1f} MB): differs from PyTorch by at most {agreed.difference:.1e} "
        f"of the largest value; checked at {shapes}"
    )


def _folder(found: "Source", out: Path, options: argparse.Namespace) -> str:
    from cbam.hub import save_pretrained

    card = dataclasses.replace(found.card, licence=options.licence or found.card.licence)
    save_pretrained(found.network, out, network=found.name, card=card, overwrite=options.overwrite)
    return f"{out}: load it with cbam.from_pretrained({str(out)!r}); check its README.md before you share it"


def _stem(source: str) -> str:
    path = Path(source)
    return (path.resolve().name if path.is_dir() else path.stem if path.is_file() else source).replace(
        ":", "-"
    )
