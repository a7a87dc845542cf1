"""Bottleneck attention module."""

import torch
from torch import Tensor, nn

from cbam.nn import door
from cbam.nn.gate import SigmoidGate, zero_

_COMBINE = ("sum", "product")


class BAM(SigmoidGate):
    """Bottleneck attention: what and where, combined before one sigmoid.

        F' = F / g + M(F) F
        M(F) = sigmoid(Mc(F) + Ms(F))       combine="sum", the paper
        M(F) = sigmoid(Mc(F) Ms(F))         combine="product", the released code
        Mc(F) = W1 relu(BN(W0 avgpool F + b0)) + b1
        Ms(F) = f1(h(f3(h(f3(h(f1(F)))))))  h = relu(BN), f1 1x1 and f3 dilated 3x3 convolutions with biases

    The gain g is 1 in the paper: the factor of F is in (1, 2), and no weights make it 1. The identity start
    uses g = 2: the factor is in (1/2, 3/2), and exactly 1/2 + sigmoid(0) = 1 in the middle.

    Reference: Park, Woo, Lee, Kweon, "BAM: Bottleneck Attention Module", BMVC 2018, arXiv 1807.06514.

    Args:
        channels: C of the feature map.
        reduction: the hidden layers have max(1, C // reduction) channels; 16 in the paper.
        dilation: the dilation of the two 3x3 convolutions; 4 in the paper.
        combine: how the two branches are combined, "sum" or "product".

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too. Training needs more than one sample, for the
    BatchNorm of Mc.

    Elsewhere: the paper has one BatchNorm at the end of each branch; the released code, which this module
    follows, has one after every hidden layer and none at the end. For Mc it pools H x H pixels, which is the
    whole map only if the map is square. It has no hidden channel if C < 16.
    """

    def __init__(
        self, channels: int, *, reduction: int = 16, dilation: int = 4, combine: str = "sum"
    ) -> None:
        super().__init__()
        door.check_count("channels", channels)
        door.check_count("reduction", reduction)
        door.check_count("dilation", dilation)
        door.check_choice("combine", combine, _COMBINE)
        self.channels, self.reduction = channels, reduction
        self.dilation, self.combine = dilation, combine
        hidden = max(1, channels // reduction)
        self.channel = nn.Sequential(
            nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        self.spatial = nn.Sequential(
            *_conv_norm_relu(nn.Conv2d(channels, hidden, 1)),
            *_conv_norm_relu(nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)),
            *_conv_norm_relu(nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)),
            nn.Conv2d(hidden, 1, 1),
        )

    def identity_(self) -> "BAM":
        """Make the module return exactly its input, at the steepest point of the sigmoid; in place.

        For a product only one factor is zeroed: with both at zero, neither would receive a gradient.
        """
        zero_(self.spatial[-1])
        if self.combine == "sum":
            zero_(self.channel[-1])
        self.set_gain(2)
        return self

    def gate(self, x: Tensor) -> Tensor:
        """1 / g + M: (N, C, H, W) -> the same."""
        x = door.feature_map(x, self.channels, door.weight_of(self.channel[0]))
        means = x.mean((2, 3))
        if self.channel[1].training:
            door.check_statistics(means)
        what, where = self.channel(means)[:, :, None, None], self.spatial(x)
        combined = what + where if self.combine == "sum" else what * where
        return (1 if self.gain is None else 1 / self.gain) + torch.sigmoid(combined)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, reduction={self.reduction}, dilation={self.dilation}, combine={self.combine!r}"
        )


def _conv_norm_relu(conv: nn.Conv2d) -> tuple[nn.Module, ...]:
    return conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()
