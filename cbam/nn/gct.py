"""Gated channel transformation."""

import torch
from torch import Tensor, nn

from cbam.nn import door
from cbam.nn.gate import Gate

torch.fx.wrap("_norms")

EPS = 1e-5


class GCT(Gate):
    """Gated channel transformation: one gate per channel, from its norm relative to those of all channels.

        F' = M(F) F         M(F)_c = 1 + tanh(gamma_c s_c / sqrt(mean over c of s_c^2 + eps) + beta_c)
        s_c = alpha_c sqrt(sum over pixels of F_c^2 + eps)

    With gamma = beta = 0, the paper's initialisation, the gate is exactly 1 + tanh(0) = 1. eps is 1e-5.

    Reference: Yang, Zhu, Wu, Yang, "Gated Channel Transformation for Visual Recognition", CVPR 2020,
    arXiv 1909.11519.

    Args:
        channels: C of the feature map.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too. Parameters: 3 C.

    Elsewhere: the released code sums squares in the dtype of the map, which overflows in float16 on ordinary
    activations; here the norms are float32. It also offers an l1 norm, which is left out here.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        door.check_count("channels", channels)
        self.channels = channels
        self.alpha = nn.Parameter(torch.empty(channels))
        self.gamma = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the paper does: alpha 1, gamma and beta 0."""
        nn.init.ones_(self.alpha)
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def identity_(self) -> "GCT":
        """Make the gate exactly 1 everywhere, at the steepest point of the tanh; in place."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)
        return self

    def gate(self, x: Tensor) -> Tensor:
        """M: (N, C, H, W) -> (N, C, 1, 1)."""
        x = door.feature_map(x, self.channels, self.alpha)
        embedding = self.alpha * (_norms(x).square() + EPS).sqrt()
        spread = (embedding.square().mean(1, keepdim=True) + EPS).sqrt()
        gate = 1 + torch.tanh(self.gamma * embedding / spread + self.beta)
        return gate.to(x.dtype)[:, :, None, None]

    def extra_repr(self) -> str:
        return f"{self.channels}"


def _norms(x: Tensor) -> Tensor:
    """The norm of every channel: (N, C, H, W) -> (N, C), at least float32."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(x, dim=(2, 3), dtype=dtype)
