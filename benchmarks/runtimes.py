"""Measure what attention costs in deployment: +SE and +CBAM against plain in ONNX Runtime and OpenVINO.

    python -m benchmarks.runtimes --files FOLDER --only-export    # takes minutes; the machine may be busy
    python -m benchmarks.runtimes --files FOLDER [--networks resnet18 ...] [--rounds 15] [--threads 1]
    python -m docs.fill_runtimes                                  # puts the table into docs/export.md

Every network is exported with `cbam.export`, which is the gate: it never writes a file that computes
something else. With --files the exports are kept in that folder and reused. Plain, SE and CBAM are then timed
in alternation, every other round in reverse order; a ratio compares two times of the same round. In float32,
on the CPU, with images of 224 px. PyTorch, with the installed kernels, is timed in the same way. The rows,
one per runtime, network and attention, are written to
benchmarks/results/runtimes-<device>-torch<version>.csv and replace those of the same runtime, network,
attention, batch size and number of threads.
"""

import argparse
import csv
import importlib.metadata
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from cbam.models import build
from cbam.portable import export
from cbam.portable.formats import FORMATS
from cbam.portable.program import settled
from cbam.studies.machine import commit, describe
from cbam.studies.timing import in_turns

HERE = Path(__file__).parent
NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
ARMS = ("", "+se", "+cbam")
KEY = ("runtime", "network", "attention", "batch", "threads")


def steps(runtime: str, network: str, batch: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Map each arm to a function that runs it once."""
    x = torch.randn(batch, 3, 224, 224)
    found: dict[str, Callable[[], object]] = {}
    for arm in ARMS:
        model = build(network + arm).eval()
        if runtime == "torch":
            found[arm] = lambda model=model: model(x)
            continue
        path = folder / f"{network}{arm}-{batch}{FORMATS[runtime].suffixes[-1]}"
        if not path.exists():
            made = export(model, path, shape=(batch, 3, 224, 224))
            print(f"{path.name}: differs by {made.agreement.difference:.1e}", flush=True)
        with settled(model):
            run = FORMATS[runtime].read(path)
        found[arm] = lambda run=run: run(x)
    return found


def measure(runtime: str, network: str, options: argparse.Namespace, folder: Path) -> list[dict]:
    """Time the arms; return a row for each."""
    with torch.inference_mode():
        timed = in_turns(
            steps(runtime, network, options.batch, folder), torch.device("cpu"), rounds=options.rounds
        )
    rows = []
    for arm, times in timed.items():
        quarters = statistics.quantiles(times.ratios, n=4) if arm else [1.0, 1.0, 1.0]
        rows.append(
            {
                "runtime": runtime, "network": network, "attention": arm.removeprefix("+") or "plain",
                "batch": options.batch, "threads": options.threads, "ms": round(times.median, 3),
                "ratio": round(times.ratio, 4), "low": round(quarters[0], 4), "high": round(quarters[2], 4),
                "rounds": len(times.ms), "load": round(os.getloadavg()[0], 1),
                "version": importlib.metadata.version({"onnx": "onnxruntime"}.get(runtime, runtime)),
                "device": describe(torch.device("cpu"))["name"], "torch": torch.__version__,
                "commit": commit(),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def write(rows: list[dict]) -> None:
    """Write the rows to the file of this device."""
    device = "".join(c if c.isalnum() else "-" for c in str(rows[0]["device"])).strip("-")
    path = HERE / "results" / f"runtimes-{device}-torch{torch.__version__.split('+')[0]}.csv"
    new = {tuple(str(row[key]) for key in KEY) for row in rows}
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if tuple(row[key] for key in KEY) not in new]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def main() -> None:
    """Export, time, print and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--runtimes", nargs="+", default=("torch", "onnx", "openvino"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--only-export", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.files or Path(scratch)
        folder.mkdir(exist_ok=True)
        for network, runtime in itertools.product(options.networks, options.runtimes):
            if options.only_export:
                steps(runtime, network, options.batch, folder)
            else:
                write(measure(runtime, network, options, folder))


if __name__ == "__main__":
    main()
