"""One image, one or several detectors: what each finds, and where the evidence for one box lies.

Shapes: H x W pixels of the image, K boxes x0, y0, x1, y1 in its pixels, in descending order of score.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cbam.errors import ConfigError, DataError, InputError, NonFiniteError
from cbam.explain.layers import LayerSpec, default_layer
from cbam.explain.maps import gradcam_at
from cbam.explain.watching import check_images, is_detection
from cbam.surgery.effects import eval_mode

SAME_OBJECT_IOU = 0.5  # boxes with at least this IoU are the same object
MIN_SHORT_SIDE = 16  # pixels of the shorter side after the detector's resizing; below it nothing is visible


@dataclass(frozen=True, eq=False)
class Detectors:
    """Detectors to run on the same images, with torchvision's interface.

    Attributes:
        networks: name -> detector of images (3, H, W) in [0, 1].
        classes: class names; label k is `classes[k - 1]`, since 0 is the background.
        about: one line per detector that names its weights.
    """

    networks: dict[str, nn.Module]
    classes: Sequence[str]
    about: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Finds:
    """What one detector finds in one image.

    Attributes:
        network: name of the detector.
        boxes: (K, 4). labels: (K,), from 1. scores: (K,), descending.
        chosen: index of the box whose evidence is shown, None if there is none.
        heat: (H, W) in [0, 1], the evidence for that box.
    """

    network: str
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    chosen: int | None = None
    heat: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Detection:
    """One image and what each of `Detectors` finds in it; all maps show the same object.

    Attributes:
        name: name of the image.
        image: uint8 (3, H, W).
        finds: one per detector.
        classes: class names, from label 1.
        method: how the maps were made, a key of `maps.METHODS`.
    """

    name: str
    image: Tensor
    finds: tuple[Finds, ...]
    classes: Sequence[str]
    method: str = "gradcam"

    def class_of(self, label: Tensor) -> str:
        """The name of a label, with its number if the name is not unique; the number if it has no name."""
        k = int(label)
        if not 1 <= k <= len(self.classes):
            return f"label {k}"
        name = self.classes[k - 1]
        return name if list(self.classes).count(name) == 1 else f"{name} ({k})"


def detect(
    detectors: Detectors,
    picture: Tensor,
    name: str = "",
    *,
    box: int = 1,
    threshold: float = 0.5,
    method: str = "layercam",
    layer: str | None = None,
) -> Detection:
    """Detect objects in an image with each of `detectors`, and map the evidence for one of them.

    `box` counts the boxes of the first detector that finds any. The others show the evidence for their own
    box of the same object: the same class, with an IoU of at least one half.

    Args:
        picture: uint8 (3, H, W).
        name: name of the image, for captions.
        box: which box, from 1 for the highest score. If there are fewer, no evidence is shown.
        threshold: boxes with a lower score are left out.
        method: as in `gradcam`. Grad-CAM weights whole channels, which also light up at other boxes;
            LayerCAM weights each element. "scorecam" is only for classifiers.
        layer: as in `gradcam_of_box`.

    Raises:
        InputError: not such an image. DataError: the image is too narrow for the detector.
        ConfigError, NonFiniteError: as in `gradcam`.
    """
    if picture.dim() != 3 or picture.shape[0] != 3 or picture.dtype != torch.uint8 or 0 in picture.shape:
        raise InputError(f"an image must be uint8 (3, H, W), got {picture.dtype} {tuple(picture.shape)}")
    if method == "scorecam":
        raise ConfigError("scorecam needs the scores of a classifier; choose another method for a detector")
    image = picture / 255
    networks = detectors.networks
    found = {label: _run_detector(label, model, image, name, threshold) for label, model in networks.items()}
    first = next((one for one in found.values() if len(one.boxes)), None)
    if first is not None and box <= len(first.boxes):
        for label, one in found.items():
            index = box - 1 if one is first else _match(one, first.boxes[box - 1], int(first.labels[box - 1]))
            if index is not None:
                found[label] = _with_evidence(one, index, networks[label], image, method, layer)
    return Detection(name, picture, tuple(found.values()), detectors.classes, method)


def gradcam_of_box(
    model: nn.Module,
    image: Tensor,
    box: Tensor,
    label: int,
    *,
    method: str = "gradcam",
    layer: str | None = None,
) -> Tensor:
    """Map the evidence for one box: `gradcam` with the score of the box as target, (H, W) in [0, 1].

    Args:
        model: a detector with torchvision's interface.
        image: (3, H, W) in [0, 1].
        box: (4,), as returned by the detector. label: its class.
        method: as in `gradcam`.
        layer: name of a layer. By default the backbone's map from which the detector predicts this box: in a
            pyramid one level, by the size of the box; otherwise the default of `gradcam`.

    Raises:
        As `gradcam`; also InputError if the detector does not find the box.
    """
    images, score = image[None], _ScoreOfBox(model, box, label)
    if layer is None:
        layer = _source_layer(score, images) or default_layer(model, images).name
    elif layer not in dict(model.named_modules()):
        raise ConfigError(f"the detector has no layer {layer!r}")
    return gradcam_at(score, images, 0, LayerSpec(f"detector.{layer}"), method)[0]


class _ScoreOfBox(nn.Module):
    """A detector as a classifier of one class: images (1, 3, H, W) -> the score (1, 1) of one box.

    The box is found again by position, not by index: a forward pass with autograd may round differently
    from one without, which can swap boxes with nearly equal scores.
    """

    def __init__(self, detector: nn.Module, box: Tensor, label: int) -> None:
        super().__init__()
        self.detector, self.box, self.label = detector, box, label

    def forward(self, images: Tensor) -> Tensor:
        (one,) = self.detector(images)
        index = _match(one, self.box, self.label)
        if index is None:
            raise InputError("the detector does not find this box")
        return one["scores"][index].reshape(1, 1)


def _source_layer(score: _ScoreOfBox, images: Tensor) -> str | None:
    """The module of the backbone whose output is the map that the score depends on directly."""
    backbone = getattr(score.detector, "backbone", None)
    if not isinstance(backbone, nn.Module):
        return None
    outputs: list[tuple[str, object]] = []
    maps: dict[str, tuple[Tensor, Tensor]] = {}  # name -> (output of the backbone, leaf passed on instead)

    def split_graph(_, given, output: Any) -> Any:
        named = output if isinstance(output, Mapping) else {"": output}
        if not all(isinstance(one, Tensor) for one in named.values()):
            return output
        maps.update((key, (one, one.detach().requires_grad_())) for key, one in named.items())
        cut = OrderedDict((key, leaf) for key, (_, leaf) in maps.items())
        return cut if named is output else cut[""]

    with ExitStack() as undo, torch.inference_mode(False), torch.enable_grad(), eval_mode(score):
        undo.callback(backbone.register_forward_hook(split_graph).remove)
        for name, module in backbone.named_modules(prefix="backbone"):
            if module is not backbone:
                hook = module.register_forward_hook(lambda _, i, out, name=name: outputs.append((name, out)))
                undo.callback(hook.remove)
        found = score(images.detach().clone())
        leaves = [leaf for _, leaf in maps.values()]
        gradients = torch.autograd.grad(found.sum(), leaves, allow_unused=True) if found.requires_grad else []
    for (given, _), gradient in zip(maps.values(), gradients, strict=False):
        if gradient is not None and gradient.any():
            same = [name for name, output in outputs if output is given]
            # SSD scales VGG's first map outside any module, so it is only recognised by its shape.
            alike = [name for name, output in outputs if getattr(output, "shape", None) == given.shape]
            return next(reversed(same or alike), None)
    return None


def _run_detector(label: str, model: nn.Module, image: Tensor, name: str, threshold: float) -> Finds:
    check_images(image[None], model)
    _refuse_narrow(model, image.shape[1:], name)
    with torch.no_grad(), eval_mode(model):
        output = model([image])
    if not is_detection(output):
        raise InputError(f"{label}: a detector must return a dict of boxes, labels and scores per image")
    boxes, labels, scores = (output[0][key] for key in ("boxes", "labels", "scores"))
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise NonFiniteError(f"{label}: the detector outputs NaN or infinity; check its weights")
    kept = scores.argsort(descending=True, stable=True)
    drawn = (scores >= threshold) & (boxes[:, 2:] > boxes[:, :2]).all(
        1
    )  # SSD may return empty boxes at an edge
    kept = kept[drawn[kept]]
    return Finds(label, boxes[kept], labels[kept], scores[kept])


def _with_evidence(
    one: Finds, index: int, model: nn.Module, image: Tensor, method: str, layer: str | None
) -> Finds:
    heat = gradcam_of_box(model, image, one.boxes[index], int(one.labels[index]), method=method, layer=layer)
    return Finds(one.network, one.boxes, one.labels, one.scores, index, heat)


def _match(one, box: Tensor, label: int) -> int | None:
    """The index of the box of that class with the highest IoU with `box`, None if that is below SAME."""
    from torchvision.ops import box_iou

    boxes, labels = (one.boxes, one.labels) if isinstance(one, Finds) else (one["boxes"], one["labels"])
    if not len(boxes):
        return None
    overlaps = box_iou(boxes.detach(), box[None])[:, 0].nan_to_num() * (labels == label)
    best = int(overlaps.argmax())
    return best if overlaps[best] >= SAME_OBJECT_IOU else None


def _refuse_narrow(model: nn.Module, size: Sequence[int], name: str) -> None:
    """Raise if the shorter side gets too small: torchvision scales both sides until the longer one fits."""
    transform = getattr(model, "transform", None)
    if transform is None or getattr(transform, "fixed_size", None):
        return
    short, long = sorted(size)
    if min(transform.min_size[-1], transform.max_size * short / long) < MIN_SHORT_SIDE:
        raise DataError(f"{name or 'an image'}: {size[1]} x {size[0]} pixels are too narrow for a detector")
