"""Global attention mechanism."""

import torch.nn.functional as F
from torch import Tensor, nn

from cbam.nn import door
from cbam.nn.gate import SigmoidGate, zero_


class GAM(nn.Module):
    """Global attention mechanism: what, then where, with a gate per pixel and channel and no pooling.

        F'  = Mc(F) F       Mc(F) = g sigmoid(W1 relu(W0 F + b0) + b1) at every pixel
        F'' = Ms(F') F'     Ms(F) = g sigmoid(BN(f7(relu(BN(f7(F))))))

    The first 7x7 convolution f7 reduces to the hidden channels, the second restores C; both have biases.

    Reference: Liu, Shao, Hoffmann, "Global Attention Mechanism: Retain Information to Enhance Channel-Spatial
    Interactions", 2021, arXiv 2112.05561.

    Args:
        channels: C of the feature map.
        reduction: the hidden layers have max(1, C // reduction) channels; 4 in the paper.
        kernel_size: the kernel size of the spatial convolutions; odd; 7 in the paper.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too. Parameters: about 25 C^2 with the
    defaults, 105 million for 2048 channels.

    Elsewhere: for ResNet50 the paper also uses grouped convolutions and shuffles the channels, to save
    parameters; this module does not.
    """

    def __init__(self, channels: int, *, reduction: int = 4, kernel_size: int = 7) -> None:
        super().__init__()
        door.check_count("channels", channels)
        door.check_count("reduction", reduction)
        door.check_odd("kernel_size", kernel_size)
        self.channels, self.reduction, self.kernel_size = channels, reduction, kernel_size
        hidden = max(1, channels // reduction)
        self.channel = _What(channels, hidden)
        self.spatial = _Where(channels, hidden, kernel_size)

    def reset_parameters(self) -> None:
        """Initialise every layer as torch does; gain 1."""
        self.channel.reset_parameters()
        self.spatial.reset_parameters()

    def identity_(self) -> "GAM":
        """Make both gates exactly 1, at the steepest point of the sigmoid; in place."""
        zero_(self.channel.fc2, self.spatial.bn2)
        self.channel.set_gain(2)
        self.spatial.set_gain(2)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(self.channel(x))

    def extra_repr(self) -> str:
        return f"{self.channels}, reduction={self.reduction}, kernel_size={self.kernel_size}"


class _What(SigmoidGate):
    kind = "what"

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.channels = channels
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def gate(self, x: Tensor) -> Tensor:
        x = door.feature_map(x, self.channels, door.weight_of(self.fc2))
        return self._open(self.fc2(F.relu(self.fc1(x))))


class _Where(SigmoidGate):
    kind = "where"

    def __init__(self, channels: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv1 = nn.Conv2d(channels, hidden, kernel_size, padding=kernel_size // 2)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, channels, kernel_size, padding=kernel_size // 2)
        self.bn2 = nn.BatchNorm2d(channels)

    def gate(self, x: Tensor) -> Tensor:
        x = door.feature_map(x, self.channels, door.weight_of(self.conv2))
        hidden = self.conv1(x)
        if self.bn1.training:
            door.check_statistics(hidden)
        return self._open(self.bn2(self.conv2(F.relu(self.bn1(hidden)))))
