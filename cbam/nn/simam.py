"""SimAM, attention without parameters."""

import math

import torch
from torch import Tensor

from cbam.errors import InputError
from cbam.nn import door
from cbam.nn.gate import Gate

torch.fx.wrap("_saliency")


class SimAM(Gate):
    """SimAM: one gate per pixel and channel, from how far the pixel is from its channel's mean.

        F' = sigmoid(1 / e) F       1 / e = (F - mean)^2 / (4 (var + lambda)) + 1/2

    mean and var are over the pixels of one channel of one sample; var divides by HW - 1. The module has no
    parameters, and its gate at the mean is sigmoid(1/2) = 0.62, so there is no identity start.

    Reference: Yang, Zhang, Li, Xie, "SimAM: A Simple, Parameter-Free Attention Module for Convolutional
    Neural Networks", ICML 2021 (PMLR 139).

    Args:
        channels: C of the feature map; only checked.
        regularization: lambda; 1e-4 in the paper.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too.

    Elsewhere: the paper's variance divides by HW, the released code's by HW - 1. The released code divides
    zero by zero on a map of one pixel, whose variance is zero here, and sums squares in the dtype of the map,
    which overflows in float16 on large maps; here the sum is float32.
    """

    def __init__(self, channels: int, *, regularization: float = 1e-4) -> None:
        super().__init__()
        door.check_count("channels", channels)
        if not (isinstance(regularization, int | float) and 0 < regularization < math.inf):
            raise InputError(f"regularization must be a positive number, got {regularization!r}")
        self.channels, self.regularization = channels, regularization

    def gate(self, x: Tensor) -> Tensor:
        """sigmoid(1 / e): (N, C, H, W) -> the same."""
        return torch.sigmoid(_saliency(door.feature_map(x, self.channels, None), self.regularization))

    def extra_repr(self) -> str:
        return f"{self.channels}, regularization={self.regularization}"


def _saliency(x: Tensor, regularization: float) -> Tensor:
    """1 / e: (N, C, H, W) -> the same."""
    deviation = x - x.mean((2, 3), keepdim=True)
    freedom = x.shape[2] * x.shape[3] - 1
    if not torch.jit.is_tracing():  # where sizes are tensors
        freedom = max(1, freedom)
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(deviation, dim=(2, 3), keepdim=True, dtype=dtype)
    scale = (4 * (norm.square() / freedom + regularization)).rsqrt().to(x.dtype)
    return (deviation * scale).square() + 0.5
