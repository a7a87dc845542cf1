"""Efficient channel attention."""

import math

from torch import Tensor, nn

from cbam.nn import door
from cbam.nn.gate import SigmoidGate, zero_


class ECA(SigmoidGate):
    """Efficient channel attention: one gate per channel, from the means of its neighbours.

        F' = M(F) F     M(F) = g sigmoid(conv_k(avgpool F))

    conv_k is a convolution along the channels, without a bias. By default k is the odd number nearest to
    (log2(C) + 1) / 2, the larger one in a tie: 3 for 64 channels, 5 for 128 to 1024, 7 for 2048.

    Reference: Wang, Wu, Zhu, Li, Zuo, Hu, "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural
    Networks", CVPR 2020, arXiv 1910.03151.

    Args:
        channels: C of the feature map.
        kernel_size: k; odd.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too. Parameters: k.

    Elsewhere: the released module takes k as an argument, 3 by default, and does not compute it. timm
    computes it and uses at least 3, which differs if C < 8.
    """

    def __init__(self, channels: int, *, kernel_size: int | None = None) -> None:
        super().__init__()
        door.check_count("channels", channels)
        if kernel_size is None:
            kernel_size = _kernel_size(channels)
        door.check_odd("kernel_size", kernel_size)
        self.channels, self.kernel_size = channels, kernel_size
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def identity_(self) -> "ECA":
        """Make the gate exactly 1 everywhere, at the steepest point of the sigmoid; in place."""
        zero_(self.conv)
        self.set_gain(2)
        return self

    def gate(self, x: Tensor) -> Tensor:
        """M: (N, C, H, W) -> (N, C, 1, 1)."""
        x = door.feature_map(x, self.channels, door.weight_of(self.conv))
        logits = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self._open(logits)[:, :, None, None]

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}{self._gain_repr()}"


def _kernel_size(channels: int) -> int:
    """The odd number nearest to (log2(C) + 1) / 2 (equation 12 with gamma 2 and b 1)."""
    return int((math.log2(channels) + 1) / 2) // 2 * 2 + 1
