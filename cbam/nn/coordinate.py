"""Coordinate attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.nn import door
from cbam.nn.gate import SigmoidGate, zero_


class CoordAttention(SigmoidGate):
    """Coordinate attention: a gate per channel and row, times a gate per channel and column.

        F' = g sigmoid(Wh h) sigmoid(Ww w) F
        [h; w] = hardswish(BN(W0 [mean of each row; mean of each column]))

    W0, Wh and Ww are 1x1 convolutions with biases; the H row means and W column means go through W0 and BN as
    one strip of H + W pixels. The identity start uses g = 4, because both sigmoids are then 1/2.

    Reference: Hou, Zhou, Feng, "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021,
    arXiv 2103.02907.

    Args:
        channels: C of the feature map.
        reduction: the hidden layer has max(8, C // reduction) channels; the released code uses 32.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too.

    Elsewhere: in timm, CoordAttn has no biases and rounds the hidden layer to a multiple of 8.
    """

    def __init__(self, channels: int, *, reduction: int = 32) -> None:
        super().__init__()
        door.check_count("channels", channels)
        door.check_count("reduction", reduction)
        self.channels, self.reduction = channels, reduction
        hidden = max(8, channels // reduction)
        self.conv = nn.Conv2d(channels, hidden, 1)
        self.bn = nn.BatchNorm2d(hidden)
        self.conv_h = nn.Conv2d(hidden, channels, 1)
        self.conv_w = nn.Conv2d(hidden, channels, 1)

    def identity_(self) -> "CoordAttention":
        """Make the gate exactly 1 everywhere, at the steepest point of both sigmoids; in place."""
        zero_(self.conv_h, self.conv_w)
        self.set_gain(4)
        return self

    def gate(self, x: Tensor) -> Tensor:
        """The product of both gates: (N, C, H, W) -> the same."""
        x = door.feature_map(x, self.channels, door.weight_of(self.conv))
        H = x.shape[2]
        strip = torch.cat((x.mean(3), x.mean(2)), 2).unsqueeze(3)  # (N, C, H + W, 1)
        strip = F.hardswish(self.bn(self.conv(strip)))
        rows, columns = strip[:, :, :H], strip[:, :, H:].transpose(2, 3)
        return self._apply_gain(torch.sigmoid(self.conv_h(rows)) * torch.sigmoid(self.conv_w(columns)))

    def extra_repr(self) -> str:
        return f"{self.channels}, reduction={self.reduction}"
