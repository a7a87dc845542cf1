"""CBAM (Woo, Park, Lee, Kweon, ECCV 2018, arXiv 1807.06521), as the authors' released code computes it.

    F'  = Mc(F) F       Mc(F) = g sigmoid(MLP(avgpool F) + MLP(maxpool F))
    F'' = Ms(F') F'     Ms(F) = g sigmoid(BN(conv([max over channels; mean over channels])))

The gain g is 1 in the paper. With g = 2 a gate whose last layer is zero is exactly 1, since
2 sigmoid(0) = 1: this is the identity start. The gain is in the state dict if it is not 1.

Shapes: N samples, C channels, H x W pixels. A feature map is (N, C, H, W) or (C, H, W). With `dim=1` it is a
signal (N, C, L) or (C, L), with `dim=3` a volume (N, C, D, H, W) or (C, D, H, W).
"""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.errors import InputError
from cbam.nn import door
from cbam.nn.gate import SigmoidGate
from cbam.nn.tail import OF_NORM, by_batch, normalising, parts, plain, refined, unseen, watched
from cbam.ops import Channel, Spatial, channel_descriptor, rescale, spatial_descriptor
from cbam.ops.reference import ALL_POOLS, POOLS, over_pixels

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_log = logging.getLogger("cbam")

# Leaves of a symbolic trace: they read shapes and dtypes, which a trace does not know.
torch.fx.wrap("channel_descriptor")
torch.fx.wrap("spatial_descriptor")
torch.fx.wrap("rescale")
torch.fx.wrap("over_pixels")


class _FusableGate(SigmoidGate):
    """A gate that runs as a fused kernel if the kernels support its layers."""

    dim: int
    known_gate: Callable  # the `gate` that the kernels and `over` implement; a subclass may override it

    def forward(self, x: Tensor) -> Tensor:
        out = refined(self, x)
        return rescale(x, self.gate(x)) if out is None else out

    known_forward = forward

    def over(self, x: Tensor) -> Tensor:
        """`forward` for an `x` that nothing reads afterwards, not even a backward: it may be overwritten."""
        if not self._has_known_gate():
            return self(x)
        gate = self.gate(x)
        fits = type(x) is Tensor and (gate.dim(), gate.dtype) == (x.dim(), x.dtype)
        return x.mul_(gate) if fits else rescale(x, gate)

    def obstacle(self) -> str:
        """Why no kernel supports this module; empty if one does."""
        if not self._has_known_gate():
            return "its gate() is overridden"
        return (
            f"kernels support only dim=2, and it has dim={self.dim}"
            if self.dim != 2
            else self._layer_obstacle()
        )

    def _has_known_gate(self) -> bool:
        return type(self).gate is type(self).known_gate and "gate" not in vars(self)

    def _layer_obstacle(self) -> str:
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """Raise if `x` (N, C, H, W) does not fit the module."""
        raise NotImplementedError

    def operands(self, x: Tensor) -> tuple[Channel | None, Spatial | None]:
        """The operands of the kernels; increments `num_batches_tracked` if statistics are tracked."""
        raise NotImplementedError


class ChannelAttention(_FusableGate):
    """What: one gate per channel (paper section 3.1).

    `pools=("avg",)` is squeeze-and-excitation (arXiv 1709.01507) with both biases.

    Args:
        channels: C of the feature map.
        reduction: the hidden layer has max(1, C // reduction) units.
        pools: which of "avg", "max", "lp" (root of the sum of squares) and "lse" (log of the sum of
            exponentials) describe a channel; their logits are summed.
        dim: the number of spatial dimensions, 1, 2 or 3. It changes no weight.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too. `dim=1`: (N, C, L); `dim=3`: (N, C, D, H, W).
    """

    def __init__(
        self, channels: int, *, reduction: int = 16, pools: Sequence[str] = POOLS, dim: int = 2
    ) -> None:
        super().__init__()
        door.check_dim(dim)
        door.check_count("channels", channels)
        door.check_count("reduction", reduction)
        named = isinstance(pools, list | tuple) and all(pool in ALL_POOLS for pool in pools)
        if not named or not pools or len(set(pools)) < len(pools):
            raise InputError(f'pools must be distinct names from "avg", "max", "lp" and "lse", got {pools!r}')
        self.channels, self.reduction, self.pools, self.dim = channels, reduction, tuple(pools), dim
        if channels < reduction:
            _log.info("ChannelAttention(%d, reduction=%d): using one hidden unit", channels, reduction)
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the released code does: torch's weights, every bias zero, gain 1."""
        for layer in (self.fc1, self.fc2):
            layer.reset_parameters()
            nn.init.zeros_(layer.bias)
        self.set_gain(1)

    def identity_(self) -> "ChannelAttention":
        """Make the gate exactly 1 everywhere, at the steepest point of the sigmoid; in place."""
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        self.set_gain(2)
        return self

    def gate(self, x: Tensor) -> Tensor:
        """Mc: (N, C, H, W) -> (N, C, 1, 1)."""
        door.check_fits(x, self.channels, door.weight_of(self.fc2), self.dim)
        logits = self.fc2(F.relu(self.fc1(channel_descriptor(x, self.pools, dim=self.dim)))).sum(1)
        return over_pixels(self._open(logits), self.dim)

    known_gate = gate

    def _layer_obstacle(self) -> str:
        first, second = parts(self, "fc1", "fc2")
        if type(first) is not nn.Linear or type(second) is not nn.Linear:
            return "its layers are not plain nn.Linear"
        weights = *parts(first, *_WEIGHTS), *parts(second, *_WEIGHTS)
        if weights[1] is None or weights[3] is None:
            return "its layers have no bias"
        if self.pools != POOLS and not set(POOLS).issuperset(self.pools):
            return f"kernels support only the pools {POOLS}, and it has {self.pools}"
        if not plain(*weights):
            return "its weights are not plain tensors"
        return "its layers have hooks" if watched(first, second) else ""

    def check(self, x: Tensor) -> None:
        """Raise if `x` (N, C, H, W) does not fit the module."""
        (layer,) = parts(self, "fc2")
        door.check_fits(x, self.channels, parts(layer, "weight")[0], self.dim)

    def operands(self, x: Tensor) -> tuple[Channel | None, Spatial | None]:
        """The operands of the kernels."""
        first, second = parts(self, "fc1", "fc2")
        (w1, b1), (w2, b2) = parts(first, *_WEIGHTS), parts(second, *_WEIGHTS)
        return Channel(w1, b1, w2, b2, self.pools, self.gain_value()), None

    def extra_repr(self) -> str:
        sizes = f"{self.channels}, reduction={self.reduction}, pools={self.pools}"
        return sizes + _dim_repr(self.dim) + self._gain_repr()


class SpatialAttention(_FusableGate):
    """Where: one gate per pixel (paper section 3.2).

    Args:
        kernel_size: of the convolution over [max over channels; mean over channels]; odd.
        dim: the number of spatial dimensions, 1, 2 or 3.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too. `dim=1`: (N, C, L); `dim=3`: (N, C, D, H, W).
    """

    def __init__(self, *, kernel_size: int = 7, dim: int = 2) -> None:
        super().__init__()
        door.check_dim(dim)
        door.check_odd("kernel_size", kernel_size)
        self.kernel_size, self.dim = kernel_size, dim
        self.conv = _CONV[dim](2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = _NORM[dim](1, momentum=0.01)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the released code does: fan-out kaiming normal, BatchNorm weight 0, gain 1."""
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")
        self.bn.reset_running_stats()
        nn.init.zeros_(self.bn.weight)
        nn.init.zeros_(self.bn.bias)
        self.set_gain(1)

    def identity_(self) -> "SpatialAttention":
        """Make the gate exactly 1 everywhere, at the steepest point of the sigmoid; in place."""
        nn.init.zeros_(self.bn.weight)
        nn.init.zeros_(self.bn.bias)
        self.set_gain(2)
        return self

    def gate(self, x: Tensor) -> Tensor:
        """Ms: (N, C, H, W) -> (N, 1, H, W)."""
        door.check_fits(x, None, door.weight_of(self.conv), self.dim)
        logits = self.conv(spatial_descriptor(x, dim=self.dim))
        if by_batch(self.bn):
            door.check_statistics(logits)
        return self._open(self.bn(logits))

    known_gate = gate

    def _layer_obstacle(self) -> str:
        conv, norm = parts(self, "conv", "bn")
        known = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d
        norm_tensors = parts(norm, *OF_NORM) if known else [None]
        if norm_tensors[0] is None:
            return "its layers are not a plain nn.Conv2d and an affine nn.BatchNorm2d"
        side = conv.kernel_size[0]
        expected = (side, side), (side // 2, side // 2), (1, 1), (1, 1), "zeros"
        if (conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.padding_mode) != expected:
            return "its convolution is not square, or has a stride, a dilation or an unusual padding"
        kernel, bias = parts(conv, *_WEIGHTS)
        if side % 2 == 0 or bias is not None:
            return "its convolution has a bias or an even kernel size"
        if not plain(kernel, *norm_tensors):
            return "its weights are not plain tensors"
        return "its layers have hooks" if watched(conv, norm) else ""

    def check(self, x: Tensor) -> None:
        """Raise if `x` (N, C, H, W) does not fit the module."""
        conv, norm = parts(self, "conv", "bn")
        door.check_fits(x, None, parts(conv, "weight")[0], self.dim)
        if by_batch(norm) and x.numel() == x.shape[1]:
            door.check_statistics(x[:, :1])

    def operands(self, x: Tensor) -> tuple[Channel | None, Spatial | None]:
        """The operands of the kernels; increments `num_batches_tracked` if statistics are tracked."""
        conv, norm = parts(self, "conv", "bn")
        return None, Spatial(parts(conv, "weight")[0], normalising(norm), self.gain_value())

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}{_dim_repr(self.dim)}{self._gain_repr()}"


_WEIGHTS = ("weight", "bias")


def _dim_repr(dim: int) -> str:
    return "" if dim == 2 else f", dim={dim}"


class CBAM(nn.Module):
    """What, then where: channel attention followed by spatial attention (paper sections 3 and 4.1).

    Args:
        channels: C of the feature map.
        reduction: of the channel attention's hidden layer.
        kernel_size: of the spatial attention's convolution; odd.
        pools: of the channel attention.
        dim: the number of spatial dimensions: 1 for signals, 2 for images, 3 for volumes.

    Shape: (N, C, H, W) -> the same; unbatched (C, H, W) too. `dim=1`: (N, C, L); `dim=3`: (N, C, D, H, W).
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        kernel_size: int = 7,
        pools: Sequence[str] = POOLS,
        dim: int = 2,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.channel = ChannelAttention(channels, reduction=reduction, pools=pools, dim=dim)
        self.spatial = SpatialAttention(kernel_size=kernel_size, dim=dim)

    def reset_parameters(self) -> None:
        """Initialise as the released code does."""
        self.channel.reset_parameters()
        self.spatial.reset_parameters()

    def identity_(self) -> "CBAM":
        """Make the module return exactly its input; in place."""
        self.channel.identity_()
        self.spatial.identity_()
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = refined(self, x)
        if out is not None:
            return out
        x = self.channel(x)
        return self.spatial.over(x) if self._unseen(x) else self.spatial(x)

    known_forward = forward

    def over(self, x: Tensor) -> Tensor:
        """`forward` for an `x` that nothing reads afterwards, not even a backward: it may be overwritten."""
        return self.spatial.over(self.channel.over(x)) if self._unseen(x) else self(x)

    def _unseen(self, x: Tensor) -> bool:
        """Whether only this code sees the value between the two gates, and no backward follows."""
        ours = type(self.channel) is ChannelAttention and type(self.spatial) is SpatialAttention
        return ours and type(x) is Tensor and unseen(self)

    def obstacle(self) -> str:
        """Why no kernel supports this module; empty if one does."""
        what, where = parts(self, "channel", "spatial")
        if type(what) is not ChannelAttention or type(where) is not SpatialAttention:
            return "its parts are not a plain ChannelAttention and SpatialAttention"
        if watched(what, where):
            return "its parts have hooks"
        return what.obstacle() or where.obstacle()

    def check(self, x: Tensor) -> None:
        """Raise if `x` (N, C, H, W) does not fit the module."""
        what, where = parts(self, "channel", "spatial")
        what.check(x)
        where.check(x)

    def operands(self, x: Tensor) -> tuple[Channel | None, Spatial | None]:
        """The operands of the kernels; increments `num_batches_tracked` if statistics are tracked."""
        what, where = parts(self, "channel", "spatial")
        return what.operands(x)[0], where.operands(x)[1]


def squeeze_excitation(channels: int, *, reduction: int = 16, dim: int = 2) -> ChannelAttention:
    """Squeeze-and-excitation (arXiv 1709.01507) with both biases, as the paper's tables count it."""
    return ChannelAttention(channels, reduction=reduction, pools=("avg",), dim=dim)
