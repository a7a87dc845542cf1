"""Triplet attention."""

import torch
from torch import Tensor, nn

from cbam.nn import door
from cbam.nn.gate import Gate, SigmoidGate, zero_
from cbam.ops import spatial_descriptor

torch.fx.wrap("spatial_descriptor")


class TripletAttention(Gate):
    """Triplet attention: the mean of three gates, each over two of the three axes of the map.

        F' = (Mhw(F) + Mcw(F) + Mhc(F)) F / 3
        M(F) = g sigmoid(BN(conv([max; mean over the third axis])))

    Mhw is the spatial gate of CBAM; Mcw has one value per channel and column, Mhc one per channel and row.
    The convolutions are k x k, from two channels to one, without a bias. With g = 2 and BN at zero the gates
    sum to exactly 3, and 3 / 3 = 1.

    Reference: Misra, Nalamada, Arasanipalai, Hou, "Rotate to Attend: Convolutional Triplet Attention Module",
    WACV 2021, arXiv 2010.03045.

    Args:
        channels: C of the feature map; no weight depends on it.
        kernel_size: k; odd; 7 in the paper.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too. Parameters: 3 (2 k^2 + 2), 300 for k = 7.

    Elsewhere: the released code multiplies the map by each gate first, and the sum of the products by 1/3;
    the values agree up to rounding.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7) -> None:
        super().__init__()
        door.check_count("channels", channels)
        door.check_odd("kernel_size", kernel_size)
        self.channels, self.kernel_size = channels, kernel_size
        self.hw, self.cw, self.hc = (_Plane(kernel_size) for _ in range(3))

    def reset_parameters(self) -> None:
        """Initialise as the released networks do: fan-out kaiming normal, BatchNorm weight 1, gain 1."""
        for plane in (self.hw, self.cw, self.hc):
            plane.reset_parameters()

    def identity_(self) -> "TripletAttention":
        """Make every gate exactly 1, at the steepest point of its sigmoid; in place."""
        for plane in (self.hw, self.cw, self.hc):
            plane.identity_()
        return self

    def gate(self, x: Tensor) -> Tensor:
        """The mean of the three gates: (N, C, H, W) -> the same."""
        x = door.feature_map(x, self.channels, door.weight_of(self.hw.conv))
        pixels = self.hw.gate(x)
        columns = self.cw.gate(x.transpose(1, 2)).transpose(1, 2)  # (N, 1, C, W) -> (N, C, 1, W)
        rows = self.hc.gate(x.transpose(1, 3)).transpose(1, 3)  # (N, 1, H, C) -> (N, C, H, 1)
        return (pixels + columns + rows) / 3

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}"


class _Plane(SigmoidGate):
    """The gate of axes 2 and 3, from the maximum and the mean over axis 1."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn.reset_parameters()
        self.set_gain(1)

    def identity_(self) -> None:
        zero_(self.bn)
        self.set_gain(2)

    def gate(self, x: Tensor) -> Tensor:
        """(N, A, B, C) -> (N, 1, B, C)."""
        logits = self.conv(spatial_descriptor(x))
        if self.bn.training:
            door.check_statistics(logits)
        return self._open(self.bn(logits))
