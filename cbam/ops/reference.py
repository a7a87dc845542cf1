"""The equations of attention in eager torch: the specification that every fast path is tested against.

Shapes: N samples, C channels, H x W pixels, P pools. A feature map is (N, C, H, W) or (C, H, W); with one
spatial dimension (N, C, L) or (C, L), with three (N, C, D, H, W) or (C, D, H, W).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from cbam.errors import DtypeError, InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POOLS = ("avg", "max")
ALL_POOLS = (*POOLS, "lp", "lse")


class Norm(NamedTuple):
    """A BatchNorm: weight, bias and running statistics (C,), as `torch.nn.functional.batch_norm` takes them.

    `batch`: normalise with the statistics of the batch, and update the running ones, if any, by `momentum`.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batch: bool
    momentum: float
    eps: float


class Channel(NamedTuple):
    """What: w1 (hidden, C), b1 (hidden,), w2 (C, hidden), b2 (C,); pools from "avg" and "max"; the gain."""

    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    pools: tuple[str, ...]
    gain: float


class Spatial(NamedTuple):
    """Where: kernel (1, 2, k, k), k odd, over [maximum; mean]; the norm of its one channel; the gain.

    The kernel has one k for each spatial dimension of the map.
    """

    kernel: Tensor | None
    norm: Norm
    gain: float


def tail(
    x: Tensor,
    shortcut: Tensor | None = None,
    *,
    shortcut_norm: Norm | None = None,
    norm: Norm | None = None,
    channel: Channel | None = None,
    spatial: Spatial | None = None,
    relu: bool = False,
) -> Tensor:
    """The end of a residual block with attention, every part optional; `x` is a batch of maps.

        y = BN(x)   z = Mc(y) y   v = Ms(z) z + shortcut   out = relu(v)

    Mc and Ms are those of `cbam.CBAM` (paper section 3, equations 2 and 3), times their gains. A
    `shortcut_norm` is applied to the shortcut first.
    """
    if norm is not None:
        x = normalised(x, norm)
    if shortcut is not None and shortcut_norm is not None:
        shortcut = normalised(shortcut, shortcut_norm)
    if channel is not None:
        x = x * what(x, channel)
    if spatial is not None:
        x = x * where(x, spatial)
    if shortcut is not None:
        x = x + shortcut
    return torch.relu(x) if relu else x


def what(x: Tensor, channel: Channel) -> Tensor:
    """Mc: (N, C, H, W) -> (N, C, 1, 1) (paper equation 2)."""
    assert channel.w1 is not None
    assert channel.w2 is not None
    described = channel_descriptor(x, channel.pools, dim=x.dim() - 2)
    hidden = F.relu(F.linear(described, channel.w1, channel.b1))
    logits = F.linear(hidden, channel.w2, channel.b2).sum(1)
    return channel.gain * over_pixels(torch.sigmoid(logits), x.dim() - 2)


def where(x: Tensor, spatial: Spatial) -> Tensor:
    """Ms: (N, C, H, W) -> (N, 1, H, W) (paper equation 3)."""
    assert spatial.kernel is not None
    dim = x.dim() - 2
    logits = _CONV[dim](spatial_descriptor(x, dim=dim), spatial.kernel, padding=spatial.kernel.shape[-1] // 2)
    return spatial.gain * torch.sigmoid(normalised(logits, spatial.norm))


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def over_pixels(gate: Tensor, dim: int) -> Tensor:
    """One factor per channel, (N, C) -> (N, C, 1, 1), with `dim` ones."""
    return gate.reshape(*gate.shape, *(1,) * dim)


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """`x` after BatchNorm."""
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.batch, norm.momentum, norm.eps
    )


def channel_descriptor(x: Tensor, pools: Sequence[str] = POOLS, *, dim: int = 2) -> Tensor:
    """All pools of each channel: (N, C, H, W) -> (N, P, C) (paper section 3, equation 2).

    "avg" and "max" are the paper's. "lp", the root of the sum of squares, and "lse", the logarithm of the sum
    of exponentials, are the released code's; both sum in float32 if `x` has 16 bits. The maximum passes its
    whole gradient to the first of equal pixels, as `max_pool2d` does.

    Args:
        dim: the number of spatial dimensions, 1, 2 or 3.

    Raises:
        InputError: not a feature map, or an empty one.
        DtypeError: not float16, bfloat16, float32 or float64.
    """
    x = batched(x, dim)
    if {"avg", "max"} <= set(pools):
        top, mean = _plane_max_and_mean(x)
        shared = {"avg": mean, "max": top}
        return torch.stack([shared[p] if p in shared else _POOL[p](x) for p in pools], 1)
    return torch.stack([_POOL[pool](x) for pool in pools], 1)


def spatial_descriptor(x: Tensor, *, dim: int = 2) -> Tensor:
    """Maximum, then mean, over the channels: (N, C, H, W) -> (N, 2, H, W) (paper section 3, equation 3).

    The maximum comes first, as in the authors' released code, and passes its whole gradient to the first of
    equal channels.

    Args:
        dim: the number of spatial dimensions, 1, 2 or 3.

    Raises:
        InputError: not a feature map, or an empty one.
        DtypeError: not float16, bfloat16, float32 or float64.
    """
    x = batched(x, dim)
    if _is_channels_last(x):
        return torch.stack(max_and_mean(x.movedim(1, -1), x.dim() - 1), 1)
    return torch.stack(max_and_mean(x, 1), 1)


def rescale(x: Tensor, gate: Tensor) -> Tensor:
    """`x`, batched or not, times a gate of shape (N, C, 1, 1) or (N, 1, H, W); keeps the layout of `x`."""
    return x * (gate if x.dim() == gate.dim() else gate.squeeze(0))


def max_and_mean(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The maximum and the mean along `dim`; the maximum's gradient goes to the first index that attains it.

    The maximum is `amax`, which on a CPU costs a fraction of `torch.max(dim)`; only the backward finds the
    index, and writes both gradients in one pass. If values along `dim` are far apart in memory, torch takes
    ten times as long to find the index; then max pooling finds both at the cost of one.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        # The same values and gradients, by operations that a trace and a compiler support.
        return x.max(dim).values, x.mean(dim)
    if torch.is_grad_enabled() and x.requires_grad:
        strided = dim == 1 and x.dim() > 2 and x.is_contiguous() and _is_plain(x)
        top, mean, _ = _MaxAndMean.apply(x, dim, strided)  # pyright: ignore[reportGeneralTypeIssues]
        return top, mean
    return x.amax(dim), x.mean(dim)


def _is_plain(x: Tensor) -> bool:
    """Whether `x` is an ordinary CPU tensor, with no mode or transform active but autograd."""
    return x.is_cpu and type(x) is Tensor and not torch._C._len_torch_dispatch_stack() and not transformed()


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active."""
    level = torch._C._functorch.maybe_current_level()  # pyright: ignore[reportAttributeAccessIssue]
    return level is not None or forward_ad._current_level >= 0


class _MaxAndMean(torch.autograd.Function):
    """Maximum and mean; and, if `strided`, the first index that attains the maximum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int, strided: bool) -> tuple[Tensor, Tensor, Tensor]:
        if strided:
            top, first = _max_and_first(x)
            return top, x.mean(dim), first
        return x.amax(dim), x.mean(dim), x.new_empty(0, dtype=torch.int64)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.dim, ctx.strided = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(x, output[2])
        ctx.save_for_forward(x, output[2])

    @staticmethod
    def backward(ctx, grad_max, grad_mean, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, first = _first(ctx)
        share = (grad_mean / x.shape[ctx.dim]).unsqueeze(ctx.dim)
        # One dense write: the mean's share everywhere, plus the maximum's where it was attained.
        grad = share.expand_as(x).scatter(ctx.dim, first, share + grad_max.unsqueeze(ctx.dim))
        return grad, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        _, first = _first(ctx)
        return tangent.gather(ctx.dim, first).squeeze(ctx.dim), tangent.mean(ctx.dim), None


def _first(ctx) -> tuple[Tensor, Tensor]:
    """The map, and the first index of its maximum."""
    x, first = ctx.saved_tensors
    return x, first.unsqueeze(ctx.dim) if ctx.strided else x.argmax(ctx.dim, keepdim=True)


def _max_and_first(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of a contiguous (N, L, ...) along L, and the first index that attains it."""
    rest = x.shape[2:]
    # A view as a channels_last map of L x 1 pixels, which is pooled many channels at a time.
    columns = x.flatten(2).unsqueeze(2).permute(0, 3, 1, 2)
    top, first = F.adaptive_max_pool2d(columns, 1, return_indices=True)
    top, first = top.reshape(-1, *rest), first.reshape(-1, *rest)
    if (unknown := top.isnan()).any():  # of several NaN, pooling returns the last
        first = torch.where(unknown, x.argmax(1), first)
    return top, first


def _plane_max_and_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and mean of each plane: (N, C, H, W) -> two (N, C)."""
    if _is_channels_last(x):
        return max_and_mean(x.movedim(1, -1).flatten(1, -2), 1)
    return max_and_mean(x.flatten(2), 2)


def _is_channels_last(x: Tensor) -> bool:
    """Whether a permuted view of `x` is contiguous; reductions and their gradients then keep its layout."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _pixels(x: Tensor) -> tuple[int, ...]:
    """The spatial axes of a batch of maps."""
    return tuple(range(2, x.dim()))


def _plane_max(x: Tensor) -> Tensor:
    return _plane_max_and_mean(x)[0]


def _plane_mean(x: Tensor) -> Tensor:
    return x.mean(_pixels(x))


def _plane_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=_pixels(x), dtype=_sum_dtype(x)).to(x.dtype)


def _plane_log_sum_exp(x: Tensor) -> Tensor:
    top = x.detach().amax(_pixels(x), keepdim=True)  # a shift that cancels, and needs no gradient
    total = (x - top).exp().sum(_pixels(x), dtype=_sum_dtype(x))
    return (top.flatten(1) + total.log()).to(x.dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """A dtype in which sums over the pixels of `x` neither overflow nor drop terms."""
    return x.dtype if x.dtype == torch.float64 else torch.float32


_POOL = {"avg": _plane_mean, "max": _plane_max, "lp": _plane_norm, "lse": _plane_log_sum_exp}


_PIXELS = {1: "L", 2: "H, W", 3: "D, H, W"}


def batched(x: Tensor, dim: int = 2) -> Tensor:
    """`x` as (N, C, H, W), or with `dim` spatial dimensions.

    Raises:
        InputError: not a feature map, or an empty one.
        DtypeError: not float16, bfloat16, float32 or float64.
    """
    if torch.jit.is_tracing():
        return x if x.dim() == dim + 2 else x.unsqueeze(0)
    if x.dtype not in FLOATS:
        raise DtypeError(
            f"attention needs a float16, bfloat16, float32 or float64 tensor, got {x.dtype}; call x.float()"
        )
    if x.dim() not in (dim + 1, dim + 2):
        expected = f"(N, C, {_PIXELS[dim]}) or (C, {_PIXELS[dim]})"
        raise InputError(f"expected a feature map {expected}, got shape {tuple(x.shape)}{other_dim(x, dim)}")
    if 0 in x.shape[-dim - 1 :]:
        raise InputError(f"channels and spatial size must be at least 1, got shape {tuple(x.shape)}")
    return x if x.dim() == dim + 2 else x.unsqueeze(0)


def other_dim(x: Tensor, dim: int) -> str:
    """A hint for the end of a message: the `dim` that fits `x`, if it is another one."""
    own = x.dim() - 2
    if own == dim or own not in _PIXELS:
        return ""
    return f"; cbam.CBAM(channels, dim={own}) takes (N, C, {_PIXELS[own]})"
