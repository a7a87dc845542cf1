"""Small networks with attention put in by hand, so that these tests stand on `cbam.nn` alone."""

import pytest
import torch
from torch import nn

import cbam


class Block(nn.Module):
    """A residual block that adds and activates in place, as torchvision's does."""

    def __init__(self, channels: int, attention: nn.Module | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.cbam = attention
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn(self.conv(x))
        if self.cbam is not None:
            out = self.cbam(out)
        out += x
        return self.relu(out)


class Net(nn.Module):
    """Stem, two stages, pooling, classes; (N, 3, H, W) -> (N, 5)."""

    def __init__(self, attention) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stage1 = Block(8, attention(8))
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.stage2 = nn.Sequential(Block(16, attention(16)), Block(16, attention(16)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.pool(x).flatten(1))


def _open_gates(model: nn.Module) -> nn.Module:
    """Give every spatial gate something to say: its BatchNorm starts at zero."""
    for module in model.modules():
        if isinstance(module, cbam.SpatialAttention):
            nn.init.normal_(module.bn.weight)
    return model


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with cbam.ops.using("reference"):  # what is watched runs the equations: bit-equal to these alone
        yield
    torch.set_num_threads(before)


@pytest.fixture
def build():
    """attention factory (channels -> module) -> a network in eval mode; CBAM by default."""
    return lambda attention=cbam.CBAM: _open_gates(Net(attention)).eval()


@pytest.fixture
def plain(build):
    return build(lambda channels: None)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 24)
