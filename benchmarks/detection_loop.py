"""A plain Faster R-CNN trained by a loop as in torchvision's references, for comparison with the engine.

    python -m benchmarks.detection_loop BCCD --size 128 --regions 64 --limit 96 --epochs 3 --batch-size 4

The settings have the same meaning as in `cbam study coco`. Only the images are shared: network, order, flips
and schedule are torchvision's and PyTorch's own. A line per seed is appended to
benchmarks/results/detection-loop.jsonl, which docs/detection.md reports.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.transforms import v2

from cbam.data import BoxedImages, boxed_folder
from cbam.train.detection_metrics import voc_ap

OUT = Path(__file__).parent / "results" / "detection-loop.jsonl"
FLIP = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float, scale=True)])


class Flipped(Dataset):
    """Images and targets in the format of torchvision's references."""

    def __init__(self, images: BoxedImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        sample = self.images[index]
        size = tuple(sample["image"].shape[-2:])
        boxes = tv_tensors.BoundingBoxes(sample["boxes"], format="XYXY", canvas_size=size)  # pyright: ignore[reportCallIssue]
        image, boxes = FLIP(tv_tensors.Image(sample["image"]), boxes)
        target = {"boxes": boxes.as_subclass(Tensor), "labels": sample["labels"]}
        return image.as_subclass(Tensor), target


def pairs(samples: list) -> tuple:
    """Collate a batch into two tuples."""
    return tuple(zip(*samples, strict=True))


def trained(train: BoxedImages, options: argparse.Namespace, seed: int) -> FasterRCNN:
    """Train torchvision's ResNet18 with a feature pyramid, nothing frozen."""
    torch.manual_seed(seed)
    model = FasterRCNN(
        _resnet_fpn_extractor(resnet18(weights=None), 5), len(train.classes) + 1,
        min_size=options.size, max_size=round(options.size * 1333 / 800),
        box_batch_size_per_image=options.regions,
        rpn_post_nms_top_n_train=4 * options.regions, rpn_post_nms_top_n_test=2 * options.regions,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    batches = DataLoader(Flipped(train), options.batch_size, shuffle=True, collate_fn=pairs)
    steps = len(batches)

    def factor(step: int) -> float:
        """One epoch of warm-up, then a half-cosine."""
        if step < steps:
            return (step + 1) / (steps + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - steps) / (steps * options.epochs - steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(options.epochs):
        for pictures, targets in batches:
            loss = torch.stack(list(model(list(pictures), list(targets)).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"seed {seed} epoch {epoch}: loss {loss.item():.3f}", flush=True)  # pyright: ignore[reportPossiblyUnboundVariable]
    return model.eval()


@torch.no_grad()
def scores(model: FasterRCNN, val: BoxedImages) -> dict[str, float]:
    """The metrics of `cbam study coco`, in %."""
    truth = dict(enumerate(val[i] for i in range(len(val))))
    found = {i: model([sample["image"] / 255])[0] for i, sample in truth.items()}
    areas = [voc_ap(found, truth, val.classes, iou=k / 100).mean for k in range(50, 100, 5)]
    return {"val_ap": float(sum(areas) / 10), "val_ap50": float(areas[0]), "val_ap75": float(areas[5])}


def main() -> None:
    """Train and score with each seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    for name in ("size", "regions", "limit", "epochs", "batch-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    train, val = (images.subset(options.limit) for images in boxed_folder(options.data))
    for seed in options.seeds:
        settings = {n: getattr(options, n) for n in ("size", "regions", "limit", "epochs", "batch_size")}
        line = {"seed": seed, **settings, **scores(trained(train, options, seed), val)}
        line |= {"torch": torch.__version__, "device": "cpu"}
        with OUT.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
