"""Measure images per second and core: our loader against the usual PIL, torchvision and float pipeline.

    python -m benchmarks.loader PICTURES [--rounds 7] [--count 256] [--short 0]

PICTURES is an image folder. Ours decodes, crops and flips in 8 bits and normalises the batch on the device;
the usual pipeline crops in PIL, converts to float and normalises image by image. Both load the same images
into batches of 64 with one thread and process, alternating in each round; ours is timed up to the 8-bit
batch, which is a worker's task, and up to the normalised float batch on the CPU. The gate: on validation,
without random crops, both give the same numbers up to rounding. `--short N` first enlarges the images to a
short side of N, as JPEG, for sizes like ImageNet's. A row is appended to
benchmarks/results/loader-<device>-torch<version>.csv.
"""

import argparse
import csv
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cbam.data import Images, image_folder, loader
from cbam.data.images import IMAGENET_MEAN, IMAGENET_STD
from cbam.studies.machine import commit
from cbam.train.classification import normalise

HERE = Path(__file__).parent
BATCH = 64


def usual(train: bool, size: int) -> Callable[[str], Tensor]:
    """torchvision's reference transforms on a PIL image: path -> float (3, size, size)."""
    from PIL import Image
    from torchvision import transforms as tv

    steps = (
        [tv.RandomResizedCrop(size), tv.RandomHorizontalFlip()]
        if train
        else [tv.Resize(round(size * 256 / 224)), tv.CenterCrop(size)]
    )
    transform = tv.Compose([*steps, tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def load(path: str) -> Tensor:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))  # type: ignore[return-value]

    return load


def gate(val: Images, paths: list[str]) -> None:
    """Exit if the pipelines differ by more than two 8-bit steps, or half a step on average."""
    load = usual(False, val.size)
    ours = normalise(torch.stack([val[i]["image"] for i in range(16)]), val.mean, val.std)
    theirs = torch.stack([load(path) for path in paths[:16]])
    apart = (ours - theirs).abs() * 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    if apart.max() > 2 or apart.mean() > 0.5:
        raise SystemExit(
            f"gate: difference of {apart.max():.2f} 8-bit steps at most, {apart.mean():.3f} on average"
        )
    print(f"gate: difference of {apart.max():.2f} 8-bit steps at most, {apart.mean():.3f} on average")


def seconds(run: Callable[[], None]) -> float:
    """Time one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def enlarged(source: Path, to: Path, short: int, count: int) -> Path:
    """Write about `count` images of each split with a short side of `short`, as JPEG of quality 90."""
    from PIL import Image

    for split in image_folder(source, size=64):
        own = split.subset(count)
        for index in range(len(own)):
            path = Path(own._images._source.name(own._indices[index]))  # type: ignore[attr-defined]
            with Image.open(path) as image:
                factor = short / min(image.size)
                large = image.convert("RGB").resize(
                    (round(image.width * factor), round(image.height * factor))
                )
            place = to / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            large.save(place, "JPEG", quality=90)
    return to


def measure(folder: Path, size: int, rounds: int, count: int) -> dict:
    """Images per second of both, and the ratios of the rounds."""
    train, val = image_folder(folder, size=size)
    gate(val, [val._source.name(i) for i in range(16)])  # type: ignore[attr-defined]
    part, load = train.subset(count), usual(True, size)
    paths = [train._source.name(i) for i in part._indices]  # type: ignore[attr-defined]

    def ours() -> None:
        for _ in loader(part, BATCH, train=True):
            pass

    def ours_to_float() -> None:
        for batch in loader(part, BATCH, train=True):
            normalise(batch["image"], train.mean, train.std)

    def theirs() -> None:
        for first in range(0, len(paths), BATCH):
            torch.stack([load(path) for path in paths[first : first + BATCH]])

    turns = [tuple(seconds(run) for run in (ours, ours_to_float, theirs)) for _ in range(rounds + 1)][1:]
    ratios = [peer / own for own, _, peer in turns]
    own, whole, peer = (round(len(part) / statistics.median(times), 1) for times in zip(*turns, strict=True))
    return {
        "ours_per_second": own,
        "ours_to_float_per_second": whole,
        "peer_per_second": peer,
        "ratio_to_float": round(statistics.median(peer / whole for _, whole, peer in turns), 3),
        "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
    }


def main() -> None:
    """Check, time, print and write the row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--short", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.pictures
        if options.short:
            folder = enlarged(folder, Path(scratch), options.short, options.count)
        found = measure(folder, options.size, options.rounds, options.count)
    machine = f"cpu-{platform.machine()}"
    row = {
        "pipeline": "cbam.data.loader", "pictures": options.pictures.name,
        "short_side": options.short or "own", "size": options.size, **found,
        "peer": "PIL + torchvision.transforms", "rounds": options.rounds, "threads": 1, "device": machine,
        "torch": torch.__version__, "commit": commit(),
    }  # fmt: skip
    print(row)
    path = HERE / "results" / f"loader-{machine}-torch{torch.__version__.split('+')[0]}.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
