"""Time a detector's training step with attention: `python -m benchmarks.detection [--device cuda]`.

The detectors with and without attention alternate on the same images (noise with random boxes), so that other
load on the machine affects both equally. The result is the median of the ratios; on a CPU, processor time is
measured. The file in benchmarks/results/ is the source of the table in the docs.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from cbam.studies import machine
from cbam.studies.timing import Step, in_turns
from cbam.train.detector import make_detector

RESULTS = Path(__file__).parent / "results"
PAIRS = (
    ("fasterrcnn:resnet18", "cbam"), ("fasterrcnn:resnet50", "cbam"), ("stairnet300:mobilenet_v1", "cbam"),
    ("stairnet300:vgg16", "cbam"),
)  # fmt: skip


def batch(count: int, size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Noise images (3, size, 4/3 size) with ten boxes each."""
    torch.manual_seed(0)
    pictures = [torch.rand(3, size, size * 4 // 3) for _ in range(count)]
    targets = []
    for _ in range(count):
        corner = torch.rand(10, 2) * size * 0.6
        boxes = torch.cat([corner, corner + size * (0.1 + 0.3 * torch.rand(10, 2))], 1)
        targets.append({"boxes": boxes, "labels": torch.randint(1, 21, (10,))})
    return pictures, targets


def stepper(name: str, options: argparse.Namespace, pictures: list[Tensor], targets: list[dict]) -> Step:
    """An SGD step on these images with the detector `name`."""
    torch.manual_seed(0)
    own = None if name.startswith(("ssd300", "stairnet300")) else options.size
    regions = options.regions if name.startswith("fasterrcnn") else None
    model: nn.Module = make_detector(name, 20, start="identity", size=own, regions=regions)
    model.to(options.device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        loss = torch.stack(list(model(pictures, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure(name: str, attention: str, options: argparse.Namespace) -> dict:
    """Time the plain detector and the one with attention in alternation."""
    device = torch.device(options.device)
    pictures, targets = batch(options.batch, options.size)
    pictures = [picture.to(device) for picture in pictures]
    targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
    steps = {n: stepper(n, options, pictures, targets) for n in (name, f"{name}+{attention}")}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    plain, attended = in_turns(steps, device, rounds=options.turns, seconds=math.inf, clock=clock).values()
    ratios = sorted(attended.ratios)
    return {
        "detector": name,
        "attention": attention,
        "plain_ms": plain.median,
        "ratio": attended.ratio,
        "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
    }


def main() -> None:
    """Measure every pair and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--regions", type=int)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    rows = []
    for name, attention in PAIRS:
        if not options.only or name in options.only:
            rows.append(measure(name, attention, options))
            print(json.dumps(rows[-1]), flush=True)
    device = machine.describe(torch.device(options.device))
    result = {
        "device": device, "torch": torch.__version__, "batch": options.batch, "size": options.size,
        "regions": options.regions, "turns": options.turns, "commit": machine.commit(), "rows": rows,
    }  # fmt: skip
    path = RESULTS / f"detection-{device['type']}-torch{torch.__version__.partition('+')[0]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
