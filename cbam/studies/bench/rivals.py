"""What our attention is measured against: other implementations of CBAM, and block ends without attention.

Shapes: N samples, C channels, H x W pixels; a feature map is (N, C, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Released(nn.Module):
    """CBAM computed operation by operation as in the authors' code (its pooling, its two passes of the MLP).

    The formula is that of `cbam.CBAM`; it is reimplemented here to time their way of computing it.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        means = self.mlp(F.avg_pool2d(x, size, stride=size).flatten(1))
        maxima = self.mlp(F.max_pool2d(x, size, stride=size).flatten(1))
        x = x * torch.sigmoid(means + maxima)[:, :, None, None].expand_as(x)
        descriptor = torch.cat((x.max(1)[0].unsqueeze(1), x.mean(1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.bn(self.conv(descriptor)))


class Tail(nn.Module):
    """The end of a residual block, operation by operation: relu(attention(norm(x)) + shortcut)."""

    def __init__(self, channels: int, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.attention = nn.BatchNorm2d(channels), attention

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        out = self.norm(x)
        if self.attention is not None:
            out = self.attention(out)
        out += shortcut
        return F.relu(out, inplace=True)


class OurTail(Tail):
    """The same end of a block, as it runs after `attach`."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        from cbam.nn.tail import begin

        assert self.attention is not None
        out = begin(self.norm, self.attention, x)
        out += shortcut
        return F.relu(out, inplace=True)


def timm_cbam(channels: int) -> nn.Module:
    """timm's CbamModule with biases as in the released code."""
    from timm.layers.cbam import CbamModule

    return CbamModule(channels, mlp_bias=True)
