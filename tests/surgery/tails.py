"""Blocks and networks for the tests of fused tails."""

import timm
import torch
import torchvision
from torch import nn
from torchvision.models import resnet

import cbam

SHORT = [2, 1, 1, 1]  # blocks of each stage: the others repeat the second
WIDTHS = {"resnet50": {}, "resnext50_32x4d": {"groups": 32, "width_per_group": 4}}


def network(name):
    """A network of a library, shortened if it has bottlenecks."""
    library, _, model = name.partition("/")
    torch.manual_seed(0)
    if library == "timm":
        short = {"layers": SHORT} if model in ("resnet26d", "resnetv2_50", "resnet50_gn") else {}
        return timm.create_model(model, num_classes=5, **short)
    if model in WIDTHS:
        return resnet.ResNet(resnet.Bottleneck, SHORT, num_classes=5, **WIDTHS[model])
    return torchvision.models.get_model(model, num_classes=5)


class Branch(nn.Module):
    """A block whose forward holds on to an inner value in the way that `habit` says."""

    def __init__(self, habit: str = "") -> None:
        super().__init__()
        self.habit, self.kept = habit, []
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        self.kept += look(out, self.habit)
        out = self.bn2(out)
        out += identity
        return self.relu(out)


def look(out, habit):
    """Ways to hold on to a value that a trace does not see."""
    if not habit or type(out) is not torch.Tensor:
        return []
    ways = {
        "the value": lambda: out,
        "a detached one": out.detach,
        "a view": lambda: out[0],
        "its memory": out.untyped_storage,
        "an array": out.numpy,
    }
    return [ways[habit]()]


def attended(habit=""):
    torch.manual_seed(0)
    (block,) = cbam.attach(nn.Sequential(Branch(habit)), start="paper").eval()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    block.kept.clear()
    return block


def unlike(model):
    """`model` with norms that differ from each other and from the identity."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if value is not None:
                nn.init.uniform_(value, 0.5, 1.5)
    return model


class Shortened(nn.Module):
    """A block with a shortcut of its own, whose subclasses use it in different ways."""

    def __init__(self, way: str = "called", layers: nn.Module | None = None) -> None:
        super().__init__()
        self.way = way
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        own = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.downsample = own if layers is None else layers

    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)
