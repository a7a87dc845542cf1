"""Selective kernel convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.nn import door

torch.fx.wrap("_match_dim")


class SelectiveKernel(nn.Module):
    """Selective kernel: two convolutions with different receptive fields, and a soft choice per channel.

        F' = a U1 + b U2        Um = relu(BN(f_m(F)))       [a, b] = softmax over m of [A z, B z]
        z = relu(BN(W avgpool(U1 + U2)))

    f_m is a grouped 3x3 convolution, dilated by m, without a bias; A, B and W have none either. The module is
    the whole selective kernel convolution: split, fuse and select. It replaces the map by new features after
    a relu, and no weights make it return its input, so there is no identity start: attach it with
    start="paper".

    Reference: Li, Wang, Hu, Yang, "Selective Kernel Networks", CVPR 2019, arXiv 1903.06586.

    Args:
        channels: C of the feature map.
        reduction: z has max(minimum, C // reduction) units; 16 in the paper.
        minimum: the least number of units of z; 32 in the paper.
        groups: of the 3x3 convolutions; 32 in the paper. The largest divisor of C up to it is used.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too. Training needs more than one sample, for the
    BatchNorm of z.

    Elsewhere: the author's PyTorch networks use one plain and one grouped 3x3 convolution, and C // 16 units
    without a minimum. timm gives each path half of the input channels by default.
    """

    def __init__(self, channels: int, *, reduction: int = 16, minimum: int = 32, groups: int = 32) -> None:
        super().__init__()
        door.check_count("channels", channels)
        door.check_count("reduction", reduction)
        door.check_count("minimum", minimum)
        self.groups = door.divisor("groups", groups, channels)
        self.channels, self.reduction, self.minimum = channels, reduction, minimum
        hidden = max(minimum, channels // reduction)
        self.near, self.far = (_branch(channels, self.groups, dilation) for dilation in (1, 2))
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.bn = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        features = door.feature_map(x, self.channels, door.weight_of(self.fc1))
        if self.bn.training:
            door.check_statistics(features[:, :, 0, 0])
        near, far = self.near(features), self.far(features)
        hidden = self.bn(self.fc1((near + far).mean((2, 3))))
        logits = self.fc2(F.relu(hidden)).unflatten(1, (2, self.channels))
        choice = logits.softmax(1).to(near.dtype)[:, :, :, None, None]
        return _match_dim(near * choice[:, 0] + far * choice[:, 1], x)

    def extra_repr(self) -> str:
        return f"{self.channels}, reduction={self.reduction}, minimum={self.minimum}, groups={self.groups}"


def _branch(channels: int, groups: int, dilation: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def _match_dim(out: Tensor, x: Tensor) -> Tensor:
    return out if x.dim() == 4 else out.squeeze(0)
