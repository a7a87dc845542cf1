"""SSD300 (Liu et al., arXiv 1512.02325) and StairNet (Woo et al., 1709.05788), on VGG16 and MobileNet.

    SSD       six maps of the backbone, each with its own classifier and box regressor
    StairNet  the same maps, and a top-down path from the last one: p_i = lateral(f_i) + deconv(p_i+1),
              smoothed; attention, if any, is on the smoothed map right before the classifier

torchvision's SSD does the rest: default boxes, matching, hard negative mining, non-maximum suppression. It
takes a list of images (3, H, W) of any size, and resizes them to 300 x 300.

CBAM's table 7 gives the parameters of eight such networks, to three digits, but not their layers. The
networks here have those counts to the last printed digit, with 21 classes: six default boxes on each of the
first four maps and four on the others (SSD's paper has four on the first); on VGG16 a pyramid of 256 channels
with 3x3 convolutions, on MobileNet V1 one of 128 channels with 1x1 convolutions and depthwise deconvolutions,
and classifiers likewise. Other choices could give the same counts.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torchvision.models import vgg16
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDFeatureExtractorVGG, SSDScoringHead

from cbam.models.mobilenet_v1 import MobileNetV1

SIZE = 300
ASPECTS = [[2, 3]] * 4 + [[2]] * 2  # and 1, at two sizes: 6, 6, 6, 6, 4, 4 boxes
ATTENTION_AT = r"backbone\.smooth\.\d+"


def ssd300(backbone: str, num_classes: int) -> SSD:
    """SSD300 on "vgg16" or "mobilenet_v1"; `num_classes` includes the background."""
    return _detector(_maps(backbone), num_classes)


def stairnet300(backbone: str, num_classes: int) -> SSD:
    """StairNet on "vgg16" or "mobilenet_v1"; attention goes on the modules that match ATTENTION_AT."""
    return _detector(Stairs(_maps(backbone)), num_classes)


def _maps(backbone: str) -> "VGGMaps | MobileNetMaps":
    return VGGMaps() if backbone == "vgg16" else MobileNetMaps()


def _detector(backbone: "VGGMaps | MobileNetMaps | Stairs", num_classes: int) -> SSD:
    boxes = DefaultBoxGenerator(ASPECTS, scales=backbone.scales)
    head = _Head(backbone.channels, boxes.num_anchors_per_location(), num_classes, backbone.kernel_size)
    return SSD(backbone, boxes, (SIZE, SIZE), num_classes, head=head)


class VGGMaps(SSDFeatureExtractorVGG):
    """VGG16 up to conv5_3, fc6 and fc7 as convolutions, and four extra stages: maps of side 38 to 1."""

    channels = (512, 1024, 512, 256, 256, 256)
    sides = (38, 19, 10, 5, 3, 1)
    scales: ClassVar = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]  # the paper's, as fractions of 300 pixels
    kernel_size, width = 3, 256

    def __init__(self) -> None:
        super().__init__(vgg16(weights=None).features, highres=False)


class MobileNetMaps(nn.Module):
    """MobileNet V1 without its classifier, and four extra stages: maps of side 19 to 1."""

    channels = (512, 1024, 512, 256, 256, 128)
    sides = (19, 10, 5, 3, 2, 1)
    scales: ClassVar = [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0]
    kernel_size, width = 1, 128

    def __init__(self) -> None:
        super().__init__()
        network = MobileNetV1()
        self.stem, self.blocks = network.stem, network.blocks
        inputs = self.channels[1]
        self.extra = nn.ModuleList()
        for outputs in self.channels[2:]:
            self.extra.append(_step(inputs, outputs))
            inputs = outputs

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x = self.stem(x)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in (10, 12):  # the last block with stride 16, and the last block
                maps.append(x)
        for step in self.extra:
            maps.append(step(maps[-1]))
        return _named(maps)


class Stairs(nn.Module):
    """The top-down path: six maps (N, C_i, S_i, S_i) -> six of equal width (N, W, S_i, S_i)."""

    def __init__(self, maps: VGGMaps | MobileNetMaps) -> None:
        super().__init__()
        self.maps = maps
        self.scales, self.kernel_size, width = maps.scales, maps.kernel_size, maps.width
        self.channels = (width,) * len(maps.channels)
        groups = 1 if self.kernel_size == 3 else width
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in maps.channels)
        self.deconv = nn.ModuleList(
            # 1 -> 3 pixels needs no padding; 1 -> 2 and all larger sizes need 1.
            nn.ConvTranspose2d(
                width, width, 3, 2, padding=int(big < 2 * small + 1), groups=groups, bias=False
            )
            for big, small in zip(maps.sides[:-1], maps.sides[1:], strict=True)
        )
        self.smooth = nn.ModuleList(
            nn.Conv2d(width, width, self.kernel_size, padding=self.kernel_size // 2) for _ in maps.channels
        )
        _xavier(self.lateral, self.deconv, self.smooth)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        below = [lateral(f) for lateral, f in zip(self.lateral, self.maps(x).values(), strict=True)]
        for i in range(len(below) - 2, -1, -1):
            below[i] = below[i] + self.deconv[i](below[i + 1], output_size=below[i].shape[-2:])
        return _named([smooth(p) for smooth, p in zip(self.smooth, below, strict=True)])


class _Head(nn.Module):
    """A classifier and a box regressor for each map, with kernel size 3 (as in torchvision) or 1."""

    def __init__(
        self, channels: Sequence[int], boxes: Sequence[int], num_classes: int, kernel_size: int
    ) -> None:
        super().__init__()

        def scoring(values: int) -> SSDScoringHead:
            convolutions = nn.ModuleList(
                nn.Conv2d(c, values * n, kernel_size, padding=kernel_size // 2)
                for c, n in zip(channels, boxes, strict=True)
            )
            _xavier(convolutions)
            return SSDScoringHead(convolutions, values)

        self.classification_head, self.regression_head = scoring(num_classes), scoring(4)

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        return {"bbox_regression": self.regression_head(maps), "cls_logits": self.classification_head(maps)}


def _step(inputs: int, outputs: int) -> nn.Sequential:
    """Halve the side: a 1x1 convolution to half the outputs, then a 3x3 one with stride 2."""
    step = nn.Sequential(
        nn.Conv2d(inputs, outputs // 2, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs // 2, outputs, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
    )
    _xavier(step)
    return step


def _xavier(*modules: nn.Module) -> None:
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _named(maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
    return OrderedDict((str(i), x) for i, x in enumerate(maps))
