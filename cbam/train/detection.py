"""Object detection: uint8 images of any size with labelled boxes; the detector's losses, average precision.

A batch is a dict of lists: "image" uint8 (3, H, W), "target" with boxes (N, 4), labels (N,), area, crowd and
difficult; and "index", a tensor. Networks have torchvision's interface: see `cbam.models.detector`.

A detector's loss is roughly a mean over the images of its part of a step (SSD divides by the number of
matched boxes in the part), so the number of processes has a small effect.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbam.train.detection_metrics import COCO_NUMBERS, coco_numbers, voc_scores
from cbam.train.distributed import world
from cbam.train.task import Part

OVERLAPS = tuple(k / 100 for k in range(50, 100, 5))
_ByIndex = dict[int, dict[str, Tensor]]


class Detection:
    """The `Task` of a detector with torchvision's interface: its losses, and its average precision in %.

    Args:
        classes: names of the labels 1, 2, ...
        rules: "coco", COCO's twelve metrics; or "voc", average precision by Pascal VOC's development kit.
    """

    def __init__(self, model: nn.Module, classes: Sequence[str], rules: str) -> None:
        self.model, self.classes, self.rules = model, list(classes), rules

    def loss(self, network: Callable[..., Any], batch: dict, part: Part) -> tuple[Tensor, Tensor]:
        """The sum of the detector's losses. Padding images are left out, but at least two images are used."""
        count = max(part.count, min(2, len(batch["target"])))
        targets = [{name: target[name] for name in ("boxes", "labels")} for target in batch["target"][:count]]
        losses = network(_pictures(batch)[:count], targets)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        return loss * part.weight, loss.new_zeros(())

    def trained(self, tally: float) -> dict[str, float]:
        """Nothing: detections on training images would need a second forward pass."""
        return {}

    def output(self, batch: dict) -> list[tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
        """The index, detections and objects of each image."""
        found = self.model(_pictures(batch))
        return [
            (index, _on_cpu(own), _on_cpu(target))
            for index, own, target in zip(batch["index"].tolist(), found, batch["target"], strict=True)
        ]

    def collected(self, outputs: list[list[tuple[int, dict, dict]]]) -> tuple[_ByIndex, _ByIndex]:
        """Detections and objects of all images, by index."""
        mine = [item for batch in outputs for item in batch]
        every = sorted((item for part in world().all(mine) for item in part), key=lambda item: item[0])
        return {i: found for i, found, _ in every}, {i: target for i, _, target in every}

    def scores(self, collected: tuple[_ByIndex, _ByIndex]) -> dict[str, float | None]:
        """`val_ap` (mean over overlaps of 0.50 to 0.95), `val_ap50`, `val_ap75`, and what the rules add.

        None where there is nothing to detect. VOC's are areas under the curve (from 2010 on), and
        `val_ap50_11points` is that of VOC2007.
        """
        rules = _coco if self.rules == "coco" else _voc
        return world().from_first(lambda: rules(*collected, self.classes))


def _coco(found: _ByIndex, truth: _ByIndex, classes: list[str]) -> dict[str, float | None]:
    numbers = coco_numbers(found, truth, classes)
    return {f"val_{name.lower().replace(' ', '_')}": _none_if_nan(numbers[name]) for name in COCO_NUMBERS}


def _voc(found: _ByIndex, truth: _ByIndex, classes: list[str]) -> dict[str, float | None]:
    asked = [*((overlap, "area") for overlap in OVERLAPS), (0.5, "11")]
    *areas, eleven = (score.mean for score in voc_scores(found, truth, classes, asked))
    return {
        "val_ap": _none_if_nan(sum(areas) / len(areas)),
        "val_ap50": _none_if_nan(areas[0]),
        "val_ap75": _none_if_nan(areas[OVERLAPS.index(0.75)]),
        "val_ap50_11points": _none_if_nan(eleven),
    }


def _none_if_nan(value: float) -> float | None:
    return float(value) if value == value else None


def _pictures(batch: dict) -> list[Tensor]:
    """The images as the detector expects them: values in 0..1."""
    kind = torch.get_default_dtype()  # float64 when training in fp64
    return [picture.to(kind) / 255 for picture in batch["image"]]


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
        for name, value in tensors.items()
    }
