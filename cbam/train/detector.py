"""The detector of a run: its image size and regions, and the weights it starts from."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cbam.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cbam.models import build, detector
from cbam.models.detectors import DETECTORS, TimmMaps
from cbam.nn.gate import SigmoidGate
from cbam.surgery import attached, load_weights
from cbam.surgery.route import SLOT
from cbam.surgery.weights import Loaded

_VGG_CONV5 = 23  # index of the fourth pooling in torchvision's VGG16; an SSD has what follows as `extra.0`


def make_detector(name: str, classes: int, *, start: str, size: int | None, regions: int | None) -> nn.Module:
    """The detector of that name, with images resized to a shorter side of `size`.

    With `regions`, the second stage of Faster R-CNN trains on that many out of four times as many proposals,
    and classifies twice as many in evaluation; torchvision's numbers are 512, 2000 and 1000.

    Raises:
        ConfigError: no such detector, or one without a choice of size or regions.
    """
    if size is not None and name.startswith(("ssd300", "stairnet300")):
        raise ConfigError(f"{name} takes images of 300 pixels: leave the size out")
    if regions is not None and not name.startswith("fasterrcnn"):
        raise ConfigError(f"regions is for Faster R-CNN, not {name}: leave it out")
    model = detector(name, num_classes=classes, start=start)
    parts: Any = model
    if size is not None:
        parts.transform.min_size, parts.transform.max_size = (size,), round(size * 1333 / 800)
    if regions is not None:
        parts.roi_heads.fg_bg_sampler.batch_size_per_image = regions
        parts.rpn._post_nms_top_n = {"training": 4 * regions, "testing": 2 * regions}
    return model


def load_initial_weights(
    model: nn.Module, name: str, source: str | Mapping[str, Tensor]
) -> tuple[Loaded, bool]:
    """Load the weights of a file or state dict into a classifier or detector, to train it from there.

    Returns what was loaded, and whether it went only into the backbone of a detector.

    The last layer of a classifier keeps its initialisation if the file's is for other classes. A detector
    also takes the weights of a classifier, for its backbone: the pyramid and the heads then keep their
    initialisation, and so do the layers that SSD adds, including the former fully connected ones of VGG16.
    So does attention that is not in the file.

    Raises:
        CheckpointNotFoundError, CheckpointError: no such file, or one that fits neither.
    """
    try:
        return load_weights(model, source), False
    except CheckpointNotFoundError:
        raise
    except CheckpointError as error:
        inside = name.partition(":")[0] in DETECTORS
        try:
            if inside:
                network, loaded = _classifier(model, name, source)
                load_backbone(model, network, attention=loaded.format != "plain")
                return replace(loaded, head_skipped=False), True  # a detector has no use for its head
            return load_weights(model, source, head="skip"), False
        except CheckpointError as misfit:
            if not inside or str(misfit) == str(error):  # one message says it all
                raise misfit from None
            raise CheckpointError(f"{misfit}; it does not fit the whole detector either: {error}") from None


def _classifier(model: nn.Module, name: str, source: str | Mapping[str, Tensor]) -> tuple[nn.Module, Loaded]:
    """The backbone of a detector as a classifier, with the weights of a file, and what was loaded."""
    inside = name.partition(":")[2]
    if _is_single_shot(model):  # its attention lies outside the classifier's layers
        inside = inside.partition("+")[0]
    with torch.random.fork_rng([]):  # no GPUs: it is built on the CPU
        network = build(inside, num_classes=1000, start="identity")
    loaded, _ = load_initial_weights(network, inside, source)
    return network, loaded


def load_backbone(model: nn.Module, network: nn.Module, *, attention: bool) -> None:
    """Copy the weights of a classifier into the backbone of a detector; with `attention`, its attention too.

    Raises:
        CheckpointError: they are different networks.
    """
    parts: Any = model
    if _is_single_shot(model):
        body, own = getattr(parts.backbone, "maps", parts.backbone), ("extra.", "scale_weight")
    else:
        body, own = parts.backbone.body, ()
    if isinstance(body, TimmMaps):
        body = body.network
    _copy(network, body, attention, own)
    head: nn.Module | None = getattr(getattr(parts, "roi_heads", None), "box_head", None)
    if head is not None and hasattr(head, "layer4"):  # fasterrcnn_c4 has the last stage in its head
        _copy(network, head, attention)


def _copy(network: nn.Module, body: nn.Module, attention: bool, own: tuple[str, ...] = ()) -> None:
    """Copy all of `body` from modules of the same names; only what begins with `own` may be missing there."""
    kept = () if attention else tuple(f"{block}.{SLOT}." for block in attached(body))
    theirs = network.state_dict()
    wanted = [key for key in body.state_dict() if not key.startswith(kept)]
    values = {key: theirs[name] for key in wanted if (name := _name(key)) in theirs}
    left = [key for key in wanted if key not in values and not key.startswith(own)]
    left = [key for key in left if not key.endswith(".gain")]
    if left:
        raise CheckpointError(f"{type(network).__name__} lacks {left[0]} of the detector's backbone")
    for key, gate in body.named_modules():
        if isinstance(gate, SigmoidGate) and not f"{key}.".startswith(kept):
            like: Any = network.get_submodule(key)
            gate.set_gain(like.gain_value())
    body.load_state_dict(values, strict=False)


def _is_single_shot(model: nn.Module) -> bool:
    from torchvision.models.detection.ssd import SSD

    return isinstance(model, SSD)


def _name(key: str) -> str:
    """The name in a classifier of a tensor in a detector's backbone."""
    if key.startswith("extra.0.") and key.count(".") == 3:
        _, _, place, kind = key.split(".")
        return f"features.{_VGG_CONV5 + int(place)}.{kind}"
    return key
