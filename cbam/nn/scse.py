"""Concurrent spatial and channel squeeze and excitation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.nn import door
from cbam.nn.gate import SigmoidGate, zero_

_COMBINE = ("sum", "max")


class SCSE(SigmoidGate):
    """Concurrent spatial and channel squeeze and excitation: what and where side by side.

        F' = Mc(F) F + Ms(F) F          combine="sum", the paper
        F' = max(Mc(F) F, Ms(F) F)      combine="max", the released code
        Mc(F) = g sigmoid(W1 relu(W0 avgpool F + b0) + b1)      Ms(F) = g sigmoid(w . F + b)

    w . F is a 1x1 convolution to one channel. The sum starts at the identity with the paper's gain of 1:
    sigmoid(0) + sigmoid(0) = 1.

    Reference: Roy, Navab, Wachinger, "Concurrent Spatial and Channel Squeeze & Excitation in Fully
    Convolutional Networks", MICCAI 2018, arXiv 1803.02579.

    Args:
        channels: C of the feature map.
        reduction: the hidden layer has max(1, C // reduction) units; 2 in the paper.
        combine: how the two refined maps are combined, "sum" or "max".

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too.

    Elsewhere: the paper has no biases; the released code and this module have all three.
    """

    def __init__(self, channels: int, *, reduction: int = 2, combine: str = "sum") -> None:
        super().__init__()
        door.check_count("channels", channels)
        door.check_count("reduction", reduction)
        door.check_choice("combine", combine, _COMBINE)
        self.channels, self.reduction, self.combine = channels, reduction, combine
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.conv = nn.Conv2d(channels, 1, 1)

    def identity_(self) -> "SCSE":
        """Make the module return exactly its input, at the steepest point of both sigmoids; in place."""
        zero_(self.fc2, self.conv)
        self.set_gain(1 if self.combine == "sum" else 2)
        return self

    def gate(self, x: Tensor) -> Tensor:
        """The factor of `x`: (N, C, H, W) -> the same."""
        x = door.feature_map(x, self.channels, door.weight_of(self.conv))
        what = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))[:, :, None, None]
        where = torch.sigmoid(self.conv(x))
        if self.combine == "sum":
            return self._apply_gain(what + where)
        # The larger product has the larger gate if x is positive, and the smaller one if x is negative.
        return self._apply_gain(torch.where(x >= 0, torch.maximum(what, where), torch.minimum(what, where)))

    def extra_repr(self) -> str:
        return f"{self.channels}, reduction={self.reduction}, combine={self.combine!r}{self._gain_repr()}"
