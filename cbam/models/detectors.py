"""Detectors by name: Faster R-CNN, RetinaNet, SSD300 and StairNet, on networks with or without attention.

A name is `detector:network[+attention]`: "fasterrcnn:resnet50+cbam", "fasterrcnn_c4:resnet101+se",
"retinanet:timm:convnext_tiny", "ssd300:vgg16", "stairnet300:mobilenet_v1+se". They are torchvision's: in
training mode they take a list of images (3, H, W) in 0..1 and a list of targets (`boxes`, `labels` from 1)
and return losses, otherwise a list of detections. Nothing is downloaded. To start from a trained classifier,
load its weights into the network first: see `faster_rcnn`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cbam.errors import ConfigError, InputError, MissingExtraError
from cbam.models.catalogue import ATTENTIONS, build
from cbam.nn import door
from cbam.surgery import attach
from cbam.surgery.effects import eval_mode

if TYPE_CHECKING:
    from torchvision.models.detection import FasterRCNN, RetinaNet

_SINGLE_SHOT = ("ssd300", "stairnet300")
DETECTORS = ("fasterrcnn", "fasterrcnn_c4", "retinanet", *_SINGLE_SHOT)
_WIDTH = 256  # of the feature pyramid
_TRIAL_SIZE = (128, 160)  # height and width of an image, multiples of 32, to which detectors pad


def detector(name: str, *, num_classes: int, start: str = "paper") -> nn.Module:
    """Build a freshly initialised detector: `detector("fasterrcnn:resnet50+cbam", num_classes=20)`.

    Args:
        name: `detector:network[+attention]`. fasterrcnn and retinanet accept `build`'s ResNets and timm
            networks with feature maps, fasterrcnn_c4 only ResNets, ssd300 and stairnet300 vgg16 and
            mobilenet_v1. Of these two only stairnet300 has attention, right before every classifier.
        num_classes: without the background.
        start: how attention is initialised, "paper" or "identity" (see `cbam.attach`).

    Raises:
        ConfigError: an unknown name, or an unsupported combination.
        InputError: name is not a str, or num_classes is not a positive int.
    """
    if not isinstance(name, str):
        raise InputError(f"the name of a detector must be a str, got {type(name).__name__}")
    kind, colon, network = name.partition(":")
    if not colon or kind not in DETECTORS:
        raise ConfigError(
            f"unknown detector {name!r}; expected DETECTOR:NETWORK, with one of {', '.join(DETECTORS)}"
        )
    door.check_count("num_classes", num_classes)
    if kind in _SINGLE_SHOT:
        return _single_shot(kind, network, num_classes, start)
    make = {"fasterrcnn": faster_rcnn, "fasterrcnn_c4": faster_rcnn_c4, "retinanet": retinanet}[kind]
    return make(build(network, start=start), num_classes)


def faster_rcnn(network: nn.Module, num_classes: int) -> FasterRCNN:
    """Build torchvision's Faster R-CNN with a feature pyramid on a classification network.

    Load weights first: `cbam.load_weights(network, file)`. The network's modules are used as they are, with
    any attached attention; its classifier is left out.

    Args:
        network: a torchvision ResNet, or a timm network that returns its intermediate maps.
        num_classes: without the background.

    Raises:
        ConfigError: another kind of network, or one that accepts images of one size only.
    """
    _require_torchvision()
    from torchvision.models.detection import FasterRCNN
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    return FasterRCNN(Pyramid(network, 4, LastLevelMaxPool()), num_classes + 1)


def faster_rcnn_c4(network: nn.Module, num_classes: int) -> FasterRCNN:
    """Build Faster R-CNN without a pyramid, as at the time of the paper: see `faster_rcnn`.

    Region proposals and boxes read one map, that of conv4 (`layer3`, stride 16), and conv5 (`layer4`) is the
    head of every box, at 14x14 (He et al., arXiv 1512.03385, appendix A). The numbers of proposals are those
    of Faster R-CNN (Ren et al., 1506.01497): 2000 in training, 300 in testing, and 128 per image in the loss.

    Args:
        network: a torchvision ResNet.

    Raises:
        ConfigError: another kind of network.
    """
    _require_torchvision()
    from torchvision.models import ResNet
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    if not isinstance(network, ResNet):
        raise ConfigError(f"fasterrcnn_c4 needs a torchvision ResNet, got {type(network).__name__}")
    return FasterRCNN(
        Conv4(network),
        rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=12000, rpn_pre_nms_top_n_test=6000,
        rpn_post_nms_top_n_train=2000, rpn_post_nms_top_n_test=300,
        box_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        box_head=Conv5(network),
        box_predictor=FastRCNNPredictor(_width(network.layer4), num_classes + 1),
        box_batch_size_per_image=128,
    )  # fmt: skip


def retinanet(network: nn.Module, num_classes: int) -> RetinaNet:
    """Build torchvision's RetinaNet with a feature pyramid on a classification network: see `faster_rcnn`."""
    _require_torchvision()
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.retinanet import _default_anchorgen
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    pyramid = Pyramid(network, 3, LastLevelP6P7(_WIDTH, _WIDTH))
    return RetinaNet(pyramid, num_classes + 1, anchor_generator=_default_anchorgen())


class Conv4(nn.Module):
    """A ResNet up to conv4: (N, 3, H, W) -> (N, C, H/16, W/16). Weights keep their names under `body`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        from torchvision.models._utils import IntermediateLayerGetter

        self.body = IntermediateLayerGetter(network, {"layer3": "0"})
        self.out_channels = _width(network.layer3)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.body(x)


class Conv5(nn.Module):
    """The last stage of a ResNet on the maps of boxes, then their mean: (K, C, 14, 14) -> (K, 2C)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.layer4 = network.layer4

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(x).mean((2, 3))


class Pyramid(nn.Module):
    """The last maps of a classification network, and a feature pyramid (Lin et al., CVPR 2017) on them.

    Args:
        network: see `faster_rcnn`.
        levels: how many of its maps are used.
        top: torchvision's block for additional, coarser maps.

    Shape: (N, 3, H, W) -> maps (N, 256, H/s, W/s) by name, the finest first.
    """

    out_channels = _WIDTH

    def __init__(self, network: nn.Module, levels: int, top: Any) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body, channels = _body(network, levels)
        self.fpn = FeaturePyramidNetwork(channels, _WIDTH, top)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body(x)
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps.values())))


class TimmMaps(nn.Module):
    """The last maps of a timm network, whose weights keep their names: `network.conv1.weight`, ..."""

    def __init__(self, network: nn.Module, levels: int) -> None:
        super().__init__()
        self.network: Any = network
        self.indices = list(range(-levels, 0))
        self.network.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.network.forward_intermediates(x, indices=self.indices, intermediates_only=True)
        return {str(i): m for i, m in enumerate(maps)}


def _body(network: nn.Module, levels: int) -> tuple[nn.Module, list[int]]:
    """A module that returns the maps of a network, and their channels."""
    from torchvision.models import ResNet
    from torchvision.models._utils import IntermediateLayerGetter

    if isinstance(network, ResNet):
        stages = [f"layer{k}" for k in range(5 - levels, 5)]
        channels = [_width(getattr(network, stage)) for stage in stages]
        return IntermediateLayerGetter(network, {stage: stage for stage in stages}), channels
    maps: Callable | None = getattr(network, "forward_intermediates", None)
    feature_info: Any = getattr(network, "feature_info", None)
    if maps is None or feature_info is None or len(feature_info) < levels:
        raise ConfigError(
            f"{type(network).__name__} returns no feature maps; a detector needs a torchvision ResNet or a "
            "timm network with forward_intermediates"
        )
    _check_any_size(network)
    channels = [level["num_chs"] for level in list(feature_info)[-levels:]]
    return TimmMaps(network, levels), channels


def _check_any_size(network: Any) -> None:
    """Raise for a timm network that accepts images of one size only; a detector's images vary in size.

    Some networks that timm marks as such accept other sizes nevertheless, so the network is run.
    """
    if not (getattr(network, "pretrained_cfg", None) or {}).get("fixed_input_size"):
        return
    like = next(network.parameters())
    try:
        with eval_mode(network), torch.no_grad():
            network.forward_intermediates(like.new_zeros(1, 3, *_TRIAL_SIZE), intermediates_only=True)
    except Exception as error:  # every network raises errors of its own
        reason = (
            f"{type(network).__name__} accepts images of one size only, but a detector's images vary in size"
        )
        raise ConfigError(f"{reason}: {str(error) or type(error).__name__}") from error


def _width(stage: Any) -> int:
    """The output channels of a ResNet's stage, from its last block: the classifier may have been replaced."""
    block = stage[-1]
    return (block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels


def _single_shot(kind: str, network: str, num_classes: int, start: str) -> nn.Module:
    _require_torchvision()
    from cbam.models import ssd

    backbone, plus, attention = network.partition("+")
    if backbone not in ("vgg16", "mobilenet_v1"):
        raise ConfigError(f"{kind} is built on vgg16 or mobilenet_v1, got {backbone!r}")
    if plus and attention not in ATTENTIONS:
        raise ConfigError(f"unknown attention {attention!r}; expected one of {', '.join(sorted(ATTENTIONS))}")
    if plus and kind == "ssd300":
        raise ConfigError("ssd300 has no place for attention; stairnet300 has, before its classifiers")
    if kind == "ssd300":
        return ssd.ssd300(backbone, num_classes + 1)
    model = ssd.stairnet300(backbone, num_classes + 1)
    return attach(model, ssd.ATTENTION_AT, ATTENTIONS[attention], start=start) if plus else model


def _require_torchvision() -> None:
    try:
        import torchvision.models.detection  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("a detector", "vision") from error
