"""Efficient multi-scale attention."""

import torch
from torch import Tensor, nn

from cbam.nn import door
from cbam.nn.gate import SigmoidGate, zero_


class EMA(SigmoidGate):
    """Efficient multi-scale attention: one gate per pixel and group of channels.

        F'  = M(F) F        M(F) = g sigmoid(softmax(avgpool P) . Q + softmax(avgpool Q) . P)
        P = GN(F sigmoid(h) sigmoid(w))     [h; w] = f1([mean of each row; mean of each column])
        Q = f3(F)

    for each group of channels separately, with shared weights. f1 and f3 are 1x1 and 3x3 convolutions with
    biases; GN normalises each channel of each sample on its own; the softmax and the dot product are over the
    channels of a group. The identity start zeroes f3 and the affine parameters of GN.

    Reference: Ouyang, He, Zhang, Luo, Guo, Zhan, Huang, "Efficient Multi-Scale Attention Module with
    Cross-Spatial Learning", ICASSP 2023, arXiv 2305.13563.

    Args:
        channels: C of the feature map.
        groups: 32 in the released code. The largest divisor of C up to it is used.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too. Parameters: 10 c^2 + 4 c for c = C / groups.

    Elsewhere: the released code fails if groups does not divide C. Many copies of it use 8 groups.
    """

    def __init__(self, channels: int, *, groups: int = 32) -> None:
        super().__init__()
        door.check_count("channels", channels)
        self.groups = door.divisor("groups", groups, channels)
        self.channels = channels
        width = channels // self.groups
        self.conv1 = nn.Conv2d(width, width, 1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(width, width)

    def identity_(self) -> "EMA":
        """Make the gate exactly 1 everywhere, at the steepest point of the sigmoid; in place."""
        zero_(self.conv3, self.norm)
        self.set_gain(2)
        return self

    def gate(self, x: Tensor) -> Tensor:
        """M: (N, C, H, W) -> the same, equal within a group."""
        x = door.feature_map(x, self.channels, door.weight_of(self.conv1))
        N, H, W = x.shape[0], x.shape[2], x.shape[3]
        width = self.channels // self.groups
        x = x.reshape(N * self.groups, width, H, W)
        strip = torch.cat((x.mean(3), x.mean(2)), 2).unsqueeze(3)
        strip = torch.sigmoid(self.conv1(strip))
        gated = x * strip[:, :, :H] * strip[:, :, H:].transpose(2, 3)
        # nn.GroupNorm rejects a plane of one pixel; the function returns the affine's bias for it.
        one = torch.group_norm(gated, width, self.norm.weight, self.norm.bias, self.norm.eps).to(x.dtype)
        three = self.conv3(x)
        logits = _match(one, three) + _match(three, one)  # (N groups, 1, H W)
        gate = self._open(logits).reshape(N, self.groups, H, W)
        return gate.repeat_interleave(width, 1)

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}"


def _match(of: Tensor, among: Tensor) -> Tensor:
    """softmax(avgpool of) . among: two (M, c, H, W) -> (M, 1, H W)."""
    weights = of.mean((2, 3)).softmax(1).to(among.dtype)
    return weights.unsqueeze(1) @ among.flatten(2)
