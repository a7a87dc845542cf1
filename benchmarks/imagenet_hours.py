"""Estimate how long the ImageNet tables take on this machine: `python -m benchmarks.imagenet_hours`.

Training steps and inferences of every row are timed in alternation on noise images, in the precision of the
study, and extrapolated to ImageNet's number of images. A row per network and device is written to
benchmarks/results/imagenet-<device>-torch<version>.json, which docs/evidence.md reports. Reading images is
not included; the last line gives the rate that every device needs.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbam.errors import ConfigError
from cbam.studies import machine
from cbam.studies.speed import interleaved
from cbam.studies.study import imagenet, run_config
from cbam.studies.tables import STUDIES
from cbam.studies.training import fast_convolutions, plain, refine
from cbam.train import pick_device
from cbam.train.versions import versions

TRAIN, VAL, CLASSES = 1_281_167, 50_000, 1000
RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write the result."""
    options = _options(argv)
    device = pick_device(options.device)
    arms = STUDIES[options.study].arms
    unknown = set(options.arms or ()) - set(arms)
    if unknown:
        raise ConfigError(
            f"study {options.study} has no row {', '.join(unknown)}; its rows: {', '.join(arms)}"
        )
    measured = measure({n: arms[n] for n in options.arms or arms}, options.batch_size, options.size, device)
    result = {
        "study": options.study,
        "device": machine.describe(device),
        "versions": versions(),
        "precision": imagenet().precision,
        "batch_size": options.batch_size,
        "size": options.size,
        "rows": measured,
    }
    kind = re.sub(r"[^A-Za-z0-9]+", "-", result["device"]["name"]).strip("-").lower()
    out = Path(options.out) / f"imagenet-{kind}-torch{result['versions']['torch']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print("\n".join(lines(result, seeds=options.seeds, devices=options.devices)))
    print(out)


class HalfPrecision(nn.Module):
    """Run a network under bfloat16 autocast, with weights and logits in float32, as in training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.model(x).float()


def measure(arms: dict[str, Any], batch_size: int, size: int, device: torch.device) -> dict[str, dict]:
    """Images per second in training and in inference, for every row."""
    protocol = imagenet()
    models = {}
    for name, arm in arms.items():
        config = run_config(protocol, arm, 0)
        model = refine(plain(config, CLASSES), config)
        models[name] = HalfPrecision(model) if protocol.precision == "bf16" else model
    images, targets = torch.randn(batch_size, 3, size, size), torch.randint(CLASSES, (batch_size,))
    with fast_convolutions(device):
        times = interleaved(models, images, targets, protocol.recipe(), device)
    return {
        name: {kind: batch_size / statistics.median(seconds) for kind, seconds in own.items()}
        for name, own in times.items()
    }


def hours(row: dict[str, float]) -> float:
    """Hours of one run on one device, with a validation after every epoch."""
    return imagenet().epochs * (TRAIN / row["train"] + VAL / row["inference"]) / 3600


def lines(result: dict[str, Any], *, seeds: int, devices: int) -> list[str]:
    """The table and the total, as Markdown."""
    rows = result["rows"]
    name = result["device"]["name"]
    found = [
        f"| row | images/s in training, {name} | hours per run |",
        "| --- | --- | --- |",
        *(f"| {row} | {own['train']:,.0f} | {hours(own):.1f} |" for row, own in rows.items()),
    ]
    whole = seeds * sum(hours(row) for row in rows.values())
    fastest = max(row["train"] for row in rows.values())
    found += [
        "",
        f"All {len(rows)} rows with {seeds} seeds: {whole:,.0f} hours on one {name}, "
        f"{whole / devices:,.0f} hours on {devices}, one run on each. Every device needs up to "
        f"{fastest:,.0f} images per second. Precision: {result['precision']}.",
    ]
    return found


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imagenet_hours", description=__doc__)
    parser.add_argument("--study", default="networks", choices=STUDIES, metavar="NAME")
    parser.add_argument("--arms", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--batch-size", type=int, default=imagenet().batch_size, metavar="N")
    parser.add_argument("--size", type=int, default=imagenet().size, metavar="PIXELS")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument("--out", default=str(RESULTS), metavar="DIR")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
