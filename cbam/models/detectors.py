"""Detectors by name: Faster R-CNN, RetinaNet, SSD300, StairNet, over plain networks or ones with attention.

A name is `detector:network[+attention]`: "fasterrcnn:resnet50+cbam", "retinanet:timm:convnext_tiny",
"ssd300:vgg16", "stairnet300:mobilenet_v1+se". They are torchvision's: in training they take a list of
pictures (3, H, W) in 0..1 and a list of targets (`boxes`, `labels` from 1) and give losses, else a list of
detections. Nothing is downloaded: weights of a classifier go into the network first: `faster_rcnn`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cbam.errors import ConfigError, InputError, MissingExtraError
from cbam.models.catalogue import ATTENTIONS, build
from cbam.surgery import attach

if TYPE_CHECKING:
    from torchvision.models.detection import FasterRCNN, RetinaNet

_OVER_VGG_OR_MOBILENET = ("ssd300", "stairnet300")
DETECTORS = ("fasterrcnn", "retinanet", *_OVER_VGG_OR_MOBILENET)
_WIDTH = 256  # of the feature pyramid


def detector(name: str, *, num_classes: int, start: str = "paper") -> nn.Module:
    """A freshly initialised detector: `detector("fasterrcnn:resnet50+cbam", num_classes=20)`.

    Args:
        name: `detector:network[+attention]`; fasterrcnn's and retinanet's networks are `build`'s ResNets
            and timm's with feature maps; ssd300 and stairnet300 have vgg16 and mobilenet_v1, and attention
            is stairnet300's alone, right before every classifier.
        num_classes: without the background.
        start: how attention begins, "paper" or "identity" (see `cbam.attach`).

    Raises:
        ConfigError: an unknown name, or a combination that there is not.
        InputError: num_classes is not a positive int.
    """
    kind, colon, network = name.partition(":")
    if not colon or kind not in DETECTORS:
        raise ConfigError(
            f"unknown detector {name!r}; expected DETECTOR:NETWORK, one of {', '.join(DETECTORS)}"
        )
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise InputError(f"num_classes must be a positive int, got {num_classes!r}")
    if kind in _OVER_VGG_OR_MOBILENET:
        return _single_shot(kind, network, num_classes, start)
    make = faster_rcnn if kind == "fasterrcnn" else retinanet
    return make(build(network, start=start), num_classes)


def faster_rcnn(network: nn.Module, num_classes: int) -> FasterRCNN:
    """torchvision's Faster R-CNN with a feature pyramid over a classification network.

    Weights go in before: `cbam.load_weights(network, file)`, then this. The network's modules are used as
    they are, attached attention among them; its classifier is left out.

    Args:
        network: a ResNet of torchvision's kind, or a timm network that gives its intermediate maps.
        num_classes: without the background.

    Raises:
        ConfigError: a network of another kind.
    """
    _need_torchvision()
    from torchvision.models.detection import FasterRCNN
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    return FasterRCNN(Pyramid(network, 4, LastLevelMaxPool()), num_classes + 1)


def retinanet(network: nn.Module, num_classes: int) -> RetinaNet:
    """torchvision's RetinaNet with a feature pyramid over a classification network: see `faster_rcnn`."""
    _need_torchvision()
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.retinanet import _default_anchorgen
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    pyramid = Pyramid(network, 3, LastLevelP6P7(_WIDTH, _WIDTH))
    return RetinaNet(pyramid, num_classes + 1, anchor_generator=_default_anchorgen())


class Pyramid(nn.Module):
    """The last maps of a classification network, and a feature pyramid (Lin et al., CVPR 2017) over them.

    Args:
        network: see `faster_rcnn`.
        levels: how many of its maps are taken.
        top: torchvision's block for the maps above.

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
    """A module that gives the maps of a network, and their channels."""
    from torchvision.models import ResNet
    from torchvision.models._utils import IntermediateLayerGetter

    if isinstance(network, ResNet):
        stages = [f"layer{k}" for k in range(5 - levels, 5)]
        widest = network.fc.in_features
        getter = IntermediateLayerGetter(network, {stage: stage for stage in stages})
        return getter, [widest >> (levels - 1 - i) for i in range(levels)]
    maps: Callable | None = getattr(network, "forward_intermediates", None)
    described: Any = getattr(network, "feature_info", None)
    if maps is None or described is None or len(described) < levels:
        raise ConfigError(
            f"{type(network).__name__} gives no feature maps; a detector takes torchvision's ResNets and "
            "timm's networks that have forward_intermediates"
        )
    channels = [level["num_chs"] for level in list(described)[-levels:]]
    return TimmMaps(network, levels), channels


def _single_shot(kind: str, network: str, num_classes: int, start: str) -> nn.Module:
    _need_torchvision()
    from cbam.models import ssd

    backbone, plus, attention = network.partition("+")
    if backbone not in ("vgg16", "mobilenet_v1"):
        raise ConfigError(f"{kind} is built over vgg16 or mobilenet_v1, got {backbone!r}")
    if plus and attention not in ATTENTIONS:
        raise ConfigError(f"unknown attention {attention!r}; expected one of {', '.join(sorted(ATTENTIONS))}")
    if plus and kind == "ssd300":
        raise ConfigError("attention is put before stairnet300's classifiers; ssd300 has no place of its own")
    if kind == "ssd300":
        return ssd.ssd300(backbone, num_classes + 1)
    model = ssd.stairnet300(backbone, num_classes + 1)
    return attach(model, ssd.ATTENTION_AT, ATTENTIONS[attention], start=start) if plus else model


def _need_torchvision() -> None:
    try:
        import torchvision.models.detection  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("a detector", "vision") from error
