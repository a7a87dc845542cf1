"""Residual networks of CBAM's table 4 that torchvision lacks, built from its blocks; needs torchvision.

Parameters are named as in torchvision's ResNets: `conv1`, `bn1`, `layer1.0.conv1`, ..., `fc`.
"""

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from cbam.errors import InputError


def resnext101_32x4d(num_classes: int = 1000) -> ResNet:
    """ResNeXt101 with 32 groups of 4 channels (Xie et al., CVPR 2017); torchvision has 32x8d and 64x4d."""
    return ResNet(Bottleneck, [3, 4, 23, 3], num_classes=num_classes, groups=32, width_per_group=4)


def wide_resnet18(num_classes: int = 1000, *, width: float) -> ResNet:
    """ResNet18 with int(width * C) channels in every stage; the stem keeps 64.

    Raises:
        InputError: a width outside [0.05, 8].
    """
    if not 0.05 <= width <= 8:
        raise InputError(f"the width of a wide_resnet18 must be from 0.05 to 8, got {width}")
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    inputs = 64
    for stage, channels in enumerate((64, 128, 256, 512), 1):
        outputs = int(width * channels)
        blocks = _block(inputs, outputs, stride=1 if stage == 1 else 2), _block(outputs, outputs, stride=1)
        setattr(model, f"layer{stage}", nn.Sequential(*blocks))
        inputs = outputs
    model.fc = nn.Linear(inputs, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _block(inputs: int, outputs: int, *, stride: int) -> BasicBlock:
    if stride == 1 and inputs == outputs:
        return BasicBlock(inputs, outputs)
    conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
    return BasicBlock(inputs, outputs, stride, nn.Sequential(conv, nn.BatchNorm2d(outputs)))
