"""Residual networks written by hand, so that most tests need only torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A user's own block: other names, functional activation, the shortcut first in the add."""

    def __init__(self, entering: int, leaving: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(leaving)
        self.second = nn.Conv2d(leaving, leaving, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(leaving)
        self.project = (
            None if entering == leaving and stride == 1 else nn.Conv2d(entering, leaving, 1, stride)
        )

    def forward(self, x):
        y = F.relu(self.norm1(self.first(x)))
        y = self.norm2(self.second(y))
        return F.relu((x if self.project is None else self.project(x)) + y)


class Net(nn.Module):
    """Three blocks between a stem and a classifier; `repeated` is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.one = Block(8, 8)
        self.two = Block(8, 16, 2)
        self.repeated = Block(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.two(self.one(self.stem(x)))
        x = self.repeated(self.repeated(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    """The hand-written network in eval mode, its norms drawn at random, so that every branch counts."""
    model = Net().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model


@pytest.fixture
def images():
    """Two small colour images."""
    return torch.randn(2, 3, 17, 23)
