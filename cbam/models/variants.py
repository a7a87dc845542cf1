"""The arrangements compared in CBAM's tables 1 to 3, each a function `channels -> module`.

Shapes: N samples, C channels, H x W pixels. A feature map F is (N, C, H, W) or (C, H, W).

    cbam-avg       Mc(F) F, channel attention only, by the average (squeeze-and-excitation)      table 1
    cbam-max       Mc(F) F, by the maximum                                                       table 1
    cbam-channel   Mc(F) F, by both                                                              tables 1, 2
    cbam-conv3/7   Mc, then Ms from a 1x1 convolution C -> 1 and a 3x3 or 7x7 one 1 -> 1         table 2
    cbam-k3        Mc, then Ms with a 3x3 convolution                                            table 2
    cbam-reversed  Ms, then Mc                                                                   table 3
    cbam-parallel  Mc(F) Ms(F) F, both gates from the same F                                     table 3

The paper does not say how "parallel" combines the gates; their product is the natural reading.

Arrangements of several modules name their weights by position (`0.fc1.weight`, `1.conv.weight`), so that
weights of one arrangement do not load into another.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from cbam.nn import CBAM, ChannelAttention, SpatialAttention, door
from cbam.ops import rescale

torch.fx.wrap("rescale")  # it reads dimensions, which a symbolic trace does not know


class ConvSpatialAttention(SpatialAttention):
    """Spatial attention from a learned descriptor (paper section 4.1): g sigmoid(BN(conv(1x1 conv(F)))).

    Args:
        channels: C of the feature map.
        kernel_size: side of the second convolution; odd.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7) -> None:
        super().__init__(kernel_size=kernel_size)
        door.check_count("channels", channels)
        self.channels = channels
        self.descriptor = nn.Conv2d(channels, 1, 1, bias=False)
        self.conv = nn.Conv2d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise both convolutions with Kaiming normal (fan-out), BatchNorm at zero, gain 1."""
        super().reset_parameters()
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def gate(self, x: Tensor) -> Tensor:
        """Ms: (N, C, H, W) -> (N, 1, H, W)."""
        x = door.feature_map(x, self.channels, door.weight_of(self.conv))
        logits = self.conv(self.descriptor(x))
        if self.bn.training:
            door.check_statistics(logits)
        return self._open(self.bn(logits))

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}"


class Parallel(nn.Module):
    """The product of gates computed from the same map: F' = g1(F) g2(F) F.

    Args:
        gates: modules whose `gate(x)` broadcasts to `x`.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too.
    """

    def __init__(self, *gates: ChannelAttention | SpatialAttention) -> None:
        super().__init__()
        self.gates = nn.ModuleList(gates)

    def reset_parameters(self) -> None:
        """Call `reset_parameters` of every gate."""
        for gate in self.gates:
            gate.reset_parameters()  # pyright: ignore[reportCallIssue]

    def identity_(self) -> "Parallel":
        """Make every gate exactly 1, in place."""
        for gate in self.gates:
            gate.identity_()  # pyright: ignore[reportCallIssue]
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for gate in self.gates:
            out = rescale(out, gate.gate(x))  # pyright: ignore[reportCallIssue]
        return out


def _conv_descriptor(channels: int, *, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(ChannelAttention(channels), ConvSpatialAttention(channels, kernel_size=kernel_size))


def _reversed(channels: int) -> nn.Sequential:
    return nn.Sequential(SpatialAttention(), ChannelAttention(channels))


def _parallel(channels: int) -> Parallel:
    return Parallel(ChannelAttention(channels), SpatialAttention())


VARIANTS: dict[str, Callable[[int], nn.Module]] = {
    "cbam-avg": partial(ChannelAttention, pools=("avg",)),
    "cbam-max": partial(ChannelAttention, pools=("max",)),
    "cbam-channel": ChannelAttention,
    "cbam-conv3": partial(_conv_descriptor, kernel_size=3),
    "cbam-conv7": partial(_conv_descriptor, kernel_size=7),
    "cbam-k3": partial(CBAM, kernel_size=3),
    "cbam-reversed": _reversed,
    "cbam-parallel": _parallel,
}
