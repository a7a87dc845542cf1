"""Detectors by name: Faster R-CNN, RetinaNet, SSD300, StairNet, over plain networks or ones with attention.

A name is `detector:network[+attention]`: "fasterrcnn:resnet50+cbam", "fasterrcnn_c4:resnet101+se",
"retinanet:timm:convnext_tiny", "ssd300:vgg16", "stairnet300:mobilenet_v1+se". They are torchvision's: in
training they take a list of images (3, H, W) in 0..1 and a list of targets (`boxes`, `labels` from 1) and
give losses, else a list of detections. Nothing is downloaded: weights of a classifier go into the network
first: `faster_rcnn`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cbam.errors import ConfigError, MissingExtraError
from cbam.models.catalogue import ATTENTIONS, build
from cbam.nn import door
from cbam.surgery import attach
from cbam.surgery.effects import eval_mode

if TYPE_CHECKING:
    from torchvision.models.detection import FasterRCNN, RetinaNet

_OVER_VGG_OR_MOBILENET = ("ssd300", "stairnet300")
DETECTORS = ("fasterrcnn", "fasterrcnn_c4", "retinanet", *_OVER_VGG_OR_MOBILENET)
_WIDTH = 256  # of the feature pyramid
_TRIED = (128, 160)  # height and width of an image, a multiple of 32 as detectors pad to


def detector(name: str, *, num_classes: int, start: str = "paper") -> nn.Module:
    """A freshly initialised detector: `detector("fasterrcnn:resnet50+cbam", num_classes=20)`.

    Args:
        name: `detector:network[+attention]`; fasterrcnn's and retinanet's networks are `build`'s ResNets
            and timm's with feature maps, fasterrcnn_c4's the ResNets; ssd300 and stairnet300 have vgg16 and
            mobilenet_v1, and attention is stairnet300's alone, right before every classifier.
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
    door.check_count("num_classes", num_classes)
    if kind in _OVER_VGG_OR_MOBILENET:
        return _single_shot(kind, network, num_classes, start)
    make = {"fasterrcnn": faster_rcnn, "fasterrcnn_c4": faster_rcnn_c4, "retinanet": retinanet}[kind]
    return make(build(network, start=start), num_classes)


def faster_rcnn(network: nn.Module, num_classes: int) -> FasterRCNN:
    """torchvision's Faster R-CNN with a feature pyramid over a classification network.

    Weights go in before: `cbam.load_weights(network, file)`, then this. The network's modules are used as
    they are, attached attention among them; its classifier is left out.

    Args:
        network: a ResNet of torchvision's kind, or a timm network that gives its intermediate maps.
        num_classes: without the background.

    Raises:
        ConfigError: a network of another kind, or one that takes images of one size alone.
    """
    _need_torchvision()
    from torchvision.models.detection import FasterRCNN
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    return FasterRCNN(Pyramid(network, 4, LastLevelMaxPool()), num_classes + 1)


def faster_rcnn_c4(network: nn.Module, num_classes: int) -> FasterRCNN:
    """Faster R-CNN without a pyramid, as it was in the paper's time: see `faster_rcnn`.

    Region proposals and boxes read one map, of conv4 (`layer3`, stride 16), and conv5 (`layer4`) is the head
    of every box, at 14x14 (He et al., arXiv 1512.03385, appendix A). Proposals are as many as in Faster R-CNN
    (Ren et al., 1506.01497): 2000 to train, 300 to test, and 128 of an image to learn from.

    Args:
        network: a ResNet of torchvision's kind.

    Raises:
        ConfigError: a network of another kind.
    """
    _need_torchvision()
    from torchvision.models import ResNet
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    if not isinstance(network, ResNet):
        raise ConfigError(f"fasterrcnn_c4 takes torchvision's ResNets, got {type(network).__name__}")
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
    """torchvision's RetinaNet with a feature pyramid over a classification network: see `faster_rcnn`."""
    _need_torchvision()
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
    """The last stage of a ResNet on the maps of boxes, and their mean: (K, C, 14, 14) -> (K, 2C)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.layer4 = network.layer4

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(x).mean((2, 3))


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
        channels = [_width(getattr(network, stage)) for stage in stages]
        return IntermediateLayerGetter(network, {stage: stage for stage in stages}), channels
    maps: Callable | None = getattr(network, "forward_intermediates", None)
    described: Any = getattr(network, "feature_info", None)
    if maps is None or described is None or len(described) < levels:
        raise ConfigError(
            f"{type(network).__name__} gives no feature maps; a detector takes torchvision's ResNets and "
            "timm's networks that have forward_intermediates"
        )
    _refuse_one_size(network)
    channels = [level["num_chs"] for level in list(described)[-levels:]]
    return TimmMaps(network, levels), channels


def _refuse_one_size(network: Any) -> None:
    """Raise for a network of timm's that takes images of one size alone; a detector's have many.

    timm says which may, and some of those take others all the same.
    """
    if not (getattr(network, "pretrained_cfg", None) or {}).get("fixed_input_size"):
        return
    like = next(network.parameters())
    try:
        with eval_mode(network), torch.no_grad():
            network.forward_intermediates(like.new_zeros(1, 3, *_TRIED), intermediates_only=True)
    except Exception as error:  # of its own kind in every network
        told = f"{type(network).__name__} takes images of one size alone, and a detector's have many"
        raise ConfigError(f"{told}: {str(error) or type(error).__name__}") from error


def _width(stage: Any) -> int:
    """The channels of a ResNet's stage; its classifier, which may be another one, does not say them."""
    block = stage[-1]
    return (block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels


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
