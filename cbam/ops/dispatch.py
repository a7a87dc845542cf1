"""The tail of a block by the fused operators: which of them is called, with which arguments.

Inference has two operators of its own: one returns a single tensor, the other overwrites its input.
"""

from typing import Any

import torch
from torch import Tensor

from cbam.ops import reference
from cbam.ops.library import (
    call_tail,
    dense,
    forward_op,
    in_place_op,
    inference_op,
    track_op,
    typed_as,
    wants_gradient,
)
from cbam.ops.reference import Channel, Norm, Spatial

_NO_NORM = Norm(None, None, None, None, False, 0.0, 0.0)
_NO_CHANNEL = Channel(None, None, None, None, ("avg",), 1.0)
_NO_SPATIAL = Spatial(None, _NO_NORM, 1.0)


def tail(
    x: Tensor,
    shortcut: Tensor | None = None,
    *,
    shortcut_norm: Norm | None = None,
    norm: Norm | None = None,
    channel: Channel | None = None,
    spatial: Spatial | None = None,
    relu: bool = False,
    overwrite: bool = False,
) -> Tensor:
    """`reference.tail` by the kernels for the device of `x`; updates running statistics as torch does.

    Args:
        x: (N, C, H, W), N at least 1. The result has its layout, NCHW or channels_last.
        shortcut: of the shape and dtype of `x`.
        shortcut_norm: applied to the shortcut first; as a separate step if a backward follows.
        overwrite: neither `x` nor a tensor that shares its memory is read afterwards. The result may then be
            written to it, if neither a backward nor batch statistics are wanted: on a CPU, new memory costs
            more than the kernels.

    Raises:
        NotImplementedError: there is no kernel for the device of `x`; see `switch.fused`.
    """
    x, layout = dense(x)
    shortcut_bn = shortcut_norm or _NO_NORM
    bn = norm or _NO_NORM
    mlp = channel or _NO_CHANNEL
    where = spatial or _NO_SPATIAL
    weights = mlp.w1, mlp.b1, mlp.w2, mlp.b2, "avg" in mlp.pools, "max" in mlp.pools, mlp.gain
    wanted = wants_gradient(
        x, shortcut, *shortcut_bn[:2], *bn[:2], *weights[:4], where.kernel, *where.norm[:2]
    )  # fmt: skip
    inference = not (wanted or bn.batch or where.norm.batch or shortcut_bn.batch)
    if shortcut is not None and shortcut_norm is not None and not inference:
        shortcut, shortcut_bn = reference.normalised(shortcut, shortcut_norm), _NO_NORM
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=layout)
    if inference:
        return _infer(
            x, shortcut, *shortcut_bn[:4], shortcut_bn.eps, *bn[:4], bn.eps, *weights,
            where.kernel, *where.norm[:4], where.norm.eps, where.gain, relu, overwrite=overwrite,
        )  # fmt: skip
    args = (
        x, shortcut, *bn[:5], bn.eps, *weights, where.kernel, *where.norm[:5], where.norm.eps, where.gain,
        relu, wanted,
    )  # fmt: skip
    # A traced graph has one node for it. Otherwise the call bypasses the dispatcher, which is faster.
    out, *saved = forward_op(*args) if torch.compiler.is_compiling() else call_tail(wanted, args)
    if bn.batch or where.norm.batch:
        _, _, _, mu, v, _, _, s_mu, s_v = saved
        _update_running_statistics(
            ((bn, mu, v), (where.norm, s_mu, s_v)), x.shape[0] * x.shape[2] * x.shape[3]
        )
    return out


def _update_running_statistics(batches: tuple[tuple[Norm, Tensor, Tensor], ...], count: int) -> None:
    """Update running statistics as `nn.BatchNorm2d` does, from a batch's mean and biased variance."""
    running, new, momenta = [], [], []
    for norm, mean, var in batches:
        if norm.batch and norm.running_mean is not None and norm.running_var is not None and norm.momentum:
            running += [norm.running_mean, norm.running_var]
            new += [mean, var]
            momenta.append(norm.momentum)
    if not running:
        return
    if not torch.compiler.is_compiling():
        with torch._C._AutoDispatchBelowAutograd():
            track_op(running, new, momenta, count)
        return
    # A compiler fuses these with the operations around them.
    pairs = zip(running[::2], running[1::2], new[::2], new[1::2], momenta, strict=True)
    for mean, var, batch_mean, batch_var, momentum in pairs:
        mean.lerp_(typed_as(mean, batch_mean), momentum)
        var.lerp_(typed_as(var, batch_var * (count / (count - 1))), momentum)


def _infer(x: Tensor, *args: Any, overwrite: bool) -> Tensor:
    """The operators of inference; the result is in the memory of `x` if that may be overwritten."""
    if torch.compiler.is_compiling():
        if not x.is_cpu:
            return inference_op(x, *args)
        out = x.clone()  # the compiler drops this copy if nothing reads x afterwards
        in_place_op(out, *args)
        return out
    with torch._C._AutoDispatchBelowAutograd():
        if not (overwrite and x.is_cpu):
            return inference_op(x, *args)
        in_place_op(x, *args)
        return x
