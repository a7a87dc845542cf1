"""MobileNet V1 (Howard et al., 2017, arXiv 1704.04861): alternating depthwise and pointwise convolutions.

Shapes: N samples, H x W pixels, K classes. (N, 3, H, W) -> (N, K); a 224 x 224 image ends in a 7 x 7 map.
"""

import math
from collections import OrderedDict

from torch import Tensor, nn

from cbam.errors import InputError

_STEM = 32
# (channels, stride) of each pointwise convolution and of the depthwise one before it (MobileNet, table 1)
_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


class MobileNetV1(nn.Module):
    """A stem, 13 blocks of a depthwise and a pointwise convolution, each with BatchNorm and ReLU, and a head.

    Parameters are named `stem.conv.weight`, `blocks.0.depthwise.conv.weight`, `blocks.0.pointwise.bn.weight`,
    ..., `fc.weight`. There is no residual block: CBAM's table 5 counts attention after every convolution, and
    the modules that match `UNITS` are those 27 places. They contain the ReLU, so attention comes after it;
    attention of the stem has the keys `stem.cbam.*`.

    Args:
        num_classes: K.
        width: the factor alpha; every layer has int(alpha * C) channels.

    Raises:
        InputError: a width outside [0.05, 8].
    """

    UNITS = r"stem|blocks\.\d+\.(depthwise|pointwise)"

    def __init__(self, num_classes: int = 1000, *, width: float = 1.0) -> None:
        super().__init__()
        if not 0.05 <= width <= 8:
            raise InputError(f"the width of a MobileNet V1 must be from 0.05 to 8, got {width}")
        inputs = int(width * _STEM)
        self.stem = _Unit(3, inputs, 3, stride=2)
        self.blocks = nn.Sequential()
        for channels, stride in _BLOCKS:
            outputs = int(width * channels)
            self.blocks.append(_block(inputs, outputs, stride))
            inputs = outputs
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Kaiming normal with the fan-out of one group: torch counts all groups, which makes depthwise
                # layers so small that the signal is lost.
                fan_out = module.out_channels * module.kernel_size[0] ** 2 // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.fc(self.avgpool(x).flatten(1))


class _Unit(nn.Module):
    """A convolution with BatchNorm and ReLU: (N, C, H, W) -> (N, D, H/s, W/s)."""

    def __init__(self, inputs: int, outputs: int, side: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, side, stride=stride, padding=side // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    depthwise = _Unit(inputs, inputs, 3, stride=stride, groups=inputs)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=_Unit(inputs, outputs, 1)))
