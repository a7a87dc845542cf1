"""Global context block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.nn import door
from cbam.nn.gate import zero_

torch.fx.wrap("_shift")


class GlobalContext(nn.Module):
    """Global context: adds one vector to every pixel, computed from an attention-weighted mean of the map.

        F' = F + W1 relu(LN(W0 c + b0)) + b1       c = sum over pixels p of softmax_p(w . F_p + b) F_p

    w . F_p is a 1x1 convolution to one channel, the softmax is over the pixels, LN is a LayerNorm over the
    hidden channels. With W1 = b1 = 0, the released code's initialisation, F' is exactly F.

    Reference: Cao, Xu, Lin, Wei, Hu, "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond",
    ICCV Workshops 2019, arXiv 1904.11492.

    Args:
        channels: C of the feature map.
        reduction: the hidden layer has max(1, C // reduction) units; 16 in the paper.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too.

    Elsewhere: the released code can also multiply by the sigmoid of such a vector, which is timm's default;
    the paper finds the addition better, and this module adds. With one hidden unit (C < 2 reduction) the
    output of the LayerNorm is constant in every implementation.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        door.check_count("channels", channels)
        door.check_count("reduction", reduction)
        self.channels, self.reduction = channels, reduction
        hidden = max(1, channels // reduction)
        self.conv = nn.Conv2d(channels, 1, 1)
        self.fc1 = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the released code does: last layer zero, fan-in kaiming for the mask."""
        for layer in (self.fc1, self.norm):
            layer.reset_parameters()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # pyright: ignore[reportArgumentType]
        zero_(self.fc2)

    def identity_(self) -> "GlobalContext":
        """Make the added vector exactly zero; in place."""
        zero_(self.fc2)
        return self

    def added(self, x: Tensor) -> Tensor:
        """What `forward` adds to `x`: (N, C, H, W) -> (N, C, 1, 1)."""
        x = door.feature_map(x, self.channels, door.weight_of(self.conv))
        weights = self.conv(x).flatten(2).softmax(2).to(x.dtype)
        context = (x.flatten(2) @ weights.transpose(1, 2)).squeeze(2)
        return self.fc2(F.relu(self.norm(self.fc1(context))))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return _shift(x, self.added(x))

    def extra_repr(self) -> str:
        return f"{self.channels}, reduction={self.reduction}"


def _shift(x: Tensor, added: Tensor) -> Tensor:
    return x + (added if x.dim() == 4 else added.squeeze(0))
