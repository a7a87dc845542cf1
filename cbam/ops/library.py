"""The fused operators: their schemas, fake kernels and autograd function; dispatch.py calls them.

`cbam::tail` is the end of a residual block with attention, every part of it optional:

    y = BN(x)   z = Mc y   v = Ms z + shortcut   out = relu(v)

Kernels are registered by device: cpu.py loads those for the CPU, triton_kernels.py and triton_gradients.py
launch those for CUDA. They are tested against `reference.tail`, the same equation in plain torch.

Shapes: N samples, C channels, H x W pixels; `x`, `shortcut` and `out` are (N, C, H, W).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbam.errors import InputError
from cbam.ops import reference
from cbam.ops.reference import Channel, Norm, Spatial

_NORM = "Tensor? gamma, Tensor? beta, {statistics}float bn_eps, "
_CHANNEL = (
    "Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, bool avg_pool, bool max_pool, float channel_gain, "
)
_SPATIAL = "Tensor? kernel, Tensor? s_gamma, Tensor? s_beta, {statistics}float s_eps, float spatial_gain, "


class _Saved(NamedTuple):
    """What the forward saves for the backward, in order; an empty tensor for what is not needed.

    Attributes:
        m: mean of each plane of x, (N, C). e, k: x where y is largest in the plane, and that pixel, (N, C).
        mu, v: mean and biased variance of the norm, (C,). gate: channel gate, (N, C).
        s: input of the spatial norm, (N, 1, H, W). s_mu, s_v: its mean and biased variance, (1,).
    """

    m: Tensor
    e: Tensor
    k: Tensor
    mu: Tensor
    v: Tensor
    gate: Tensor
    s: Tensor
    s_mu: Tensor
    s_v: Tensor


_SAVED = ", ".join(f"Tensor {name}" for name in _Saved._fields)


def _parts(statistics: str, spatial_statistics: str) -> str:
    return _NORM.format(statistics=statistics) + _CHANNEL + _SPATIAL.format(statistics=spatial_statistics)


_FORWARD = (
    "tail(Tensor x, Tensor? shortcut, "
    + _parts("Tensor? mean, Tensor? var, bool bn_batch, ", "Tensor? s_mean, Tensor? s_var, bool s_batch, ")
    + f"bool relu, bool save) -> (Tensor out, {_SAVED})"
)
# The arguments of a forward without backward and without batch statistics; it may normalise the shortcut too.
_INFERENCE = (
    "Tensor? shortcut, Tensor? shortcut_gamma, Tensor? shortcut_beta, Tensor? shortcut_mean, "
    "Tensor? shortcut_var, float shortcut_eps, "
    + _parts("Tensor? mean, Tensor? var, ", "Tensor? s_mean, Tensor? s_var, ")
    + "bool relu"
)
_BACKWARD = (
    "tail_backward(Tensor grad, Tensor x, Tensor? out, "
    + _parts("bool bn_batch, ", "bool s_batch, ")
    + f"bool relu, {_SAVED}, bool need_x, bool need_shortcut) -> (Tensor dx, Tensor g, Tensor dgamma, "
    "Tensor dbeta, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dkernel, Tensor ds_gamma, "
    "Tensor ds_beta)"
)

# Updates the running means and variances of one or two norms from those of a batch of `count` values per
# channel, as nn.BatchNorm2d does; the variances of the batch are biased.
_TRACK = "track_(Tensor(a!)[] running, Tensor[] new, float[] momenta, int count) -> ()"

_library = torch.library.Library("cbam", "DEF")
# flexible_layout: torch.compile may pass maps in the layout that it chose for the network.
_library.define(_FORWARD, tags=torch.Tag.flexible_layout)
_library.define(f"tail_inference(Tensor x, {_INFERENCE}) -> Tensor out", tags=torch.Tag.flexible_layout)
_library.define(f"tail_(Tensor(a!) x, {_INFERENCE}) -> ()", tags=torch.Tag.flexible_layout)
_library.define(_BACKWARD, tags=torch.Tag.flexible_layout)
_library.define(_TRACK)
forward_op = torch.ops.cbam.tail.default
inference_op = torch.ops.cbam.tail_inference.default
in_place_op = torch.ops.cbam.tail_.default
backward_op = torch.ops.cbam.tail_backward.default
track_op = torch.ops.cbam.track_.default


def dense(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """`x` itself if its layout is one that kernels support, NCHW or channels_last; else a contiguous copy."""
    if x.is_contiguous():
        return x, torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, torch.channels_last
    return x.contiguous(), torch.contiguous_format


class _Args(NamedTuple):
    """The arguments of `cbam::tail`, in order."""

    x: Any
    shortcut: Any
    gamma: Any
    beta: Any
    mean: Any
    var: Any
    bn_batch: Any
    bn_eps: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any
    avg_pool: Any
    max_pool: Any
    channel_gain: Any
    kernel: Any
    s_gamma: Any
    s_beta: Any
    s_mean: Any
    s_var: Any
    s_batch: Any
    s_eps: Any
    spatial_gain: Any
    relu: Any
    save: Any


# The arguments that have a gradient, in the order in which `cbam::tail_backward` returns them.
_DIFFERENTIABLE = ("x", "shortcut", "gamma", "beta", "w1", "b1", "w2", "b2", "kernel", "s_gamma", "s_beta")
_GRADIENTS = tuple(_Args._fields.index(name) for name in _DIFFERENTIABLE)
_RELU = _Args._fields.index("relu")
_KEPT = tuple(_Args._fields.index(name) for name in _DIFFERENTIABLE if name != "shortcut")


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any):
        with torch._C._AutoDispatchBelowAutograd():
            results = forward_op(*args)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        ctx.plain = [None if isinstance(a, Tensor) else a for a in args]
        out = results[0] if args[_RELU] else None  # shows where the ReLU passed its input
        ctx.save_for_backward(*[args[index] for index in _KEPT], out, *results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return (None,) * len(_Args._fields)
        args, out, saved = _unpack_saved(ctx)
        needs = {n for n, i in zip(_DIFFERENTIABLE, _GRADIENTS, strict=True) if ctx.needs_input_grad[i]}
        # Gradients are enabled here only if this gradient will be differentiated itself.
        compute = _differentiable_gradients if torch.is_grad_enabled() else _gradients
        found = compute(grad, args, out, saved, needs)
        gradients: list[Tensor | None] = [None] * len(_Args._fields)
        for name, index in zip(_DIFFERENTIABLE, _GRADIENTS, strict=True):
            if name in needs:
                like = grad if name in ("x", "shortcut") else args[index]  # maps have the dtype of grad
                gradients[index] = typed_as(like, found[name])
        return tuple(gradients)


def typed_as(like: Tensor, t: Tensor) -> Tensor:
    """`t` in the dtype of `like`; `to` takes time even if there is nothing to convert."""
    return t if t.dtype == like.dtype else t.to(like.dtype)


def _unpack_saved(ctx: Any) -> tuple[_Args, Tensor | None, _Saved]:
    """The arguments of the forward, without shortcut and running statistics, and its results."""
    tensors = ctx.saved_tensors
    args = list(ctx.plain)
    for index, value in zip(_KEPT, tensors, strict=False):
        args[index] = value
    out, *saved = tensors[len(_KEPT) :]
    return _Args(*args), out, _Saved(*saved)


def _gradients(
    grad: Tensor, a: _Args, out: Tensor | None, saved: _Saved, needs: set[str]
) -> dict[str, Tensor]:
    """The gradients from the kernels, by the name of the argument."""
    layout = dense(a.x)[1]
    values = backward_op(
        grad.contiguous(memory_format=layout), a.x, out,
        a.gamma, a.beta, a.bn_batch, a.bn_eps,
        a.w1, a.b1, a.w2, a.b2, a.avg_pool, a.max_pool, a.channel_gain,
        a.kernel, a.s_gamma, a.s_beta, a.s_batch, a.s_eps, a.spatial_gain,
        a.relu, *saved, "x" in needs, "shortcut" in needs and a.relu,
    )  # fmt: skip
    found: dict[str, Tensor] = dict(zip(_DIFFERENTIABLE, values, strict=True))
    if not a.relu:
        found["shortcut"] = grad
    return found


def _differentiable_gradients(
    grad: Tensor, a: _Args, out: Tensor | None, saved: _Saved, needs: set[str]
) -> dict[str, Tensor]:
    """Gradients that can be differentiated again: from the equation, in the kernels' accumulation dtype."""
    masked = grad if out is None else torch.where(out <= 0, torch.zeros_like(grad), grad)
    wide = torch.float64 if a.x.dtype == torch.float64 else torch.float32
    leaves = {
        name: t for name in _DIFFERENTIABLE if name != "shortcut" and (t := getattr(a, name)) is not None
    }
    a = a._replace(**{name: t.to(wide) for name, t in leaves.items()})
    norm = channel = spatial = None
    if a.gamma is not None:
        norm = _norm(a.gamma, a.beta, saved.mu, saved.v, a.bn_batch, a.bn_eps)
    if a.w1 is not None:
        pools = tuple(pool for pool, taken in (("avg", a.avg_pool), ("max", a.max_pool)) if taken)
        channel = Channel(a.w1, a.b1, a.w2, a.b2, pools, a.channel_gain)
    if a.kernel is not None:
        where = _norm(a.s_gamma, a.s_beta, saved.s_mu, saved.s_v, a.s_batch, a.s_eps)
        spatial = Spatial(a.kernel, where, a.spatial_gain)
    with torch.autocast(a.x.device.type, enabled=False):
        branch = reference.tail(a.x, norm=norm, channel=channel, spatial=spatial)
    found, wanted = {"shortcut": masked}, [name for name in leaves if name in needs]
    if wanted:
        inputs = [leaves[name] for name in wanted]
        values = torch.autograd.grad(branch, inputs, masked.to(wide), create_graph=True)
        found |= dict(zip(wanted, values, strict=True))
    return found


def _norm(weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, batch: bool, eps: float) -> Norm:
    """The norm of a forward with these statistics; batch statistics are recomputed."""
    known = (None, None) if batch else (mean.to(weight.dtype), var.to(weight.dtype))
    return Norm(weight, bias, *known, batch, 0.0, eps)


def _autograd(*args: Any) -> tuple[Tensor, ...]:
    """The autograd kernel of `cbam::tail`."""
    return call_tail(wants_gradient(*(args[index] for index in _GRADIENTS)), args)


def call_tail(wanted: bool, args: tuple) -> tuple[Tensor, ...]:
    """Call `cbam::tail` without the dispatcher, which is faster; record a backward if one is `wanted`."""
    if wanted:
        return _Tail.apply(*args)  # pyright: ignore[reportReturnType]
    with torch._C._AutoDispatchBelowAutograd():
        return forward_op(*args)


def wants_gradient(*values: Tensor | None) -> bool:
    """Whether autograd must record an operation on these."""
    if not torch.is_grad_enabled():
        return False
    for value in values:  # noqa: SIM110  (a generator takes four times as long)
        if value is not None and value.requires_grad:
            return True
    return False


def _fake_forward(x, shortcut, gamma, beta, mean, var, bn_batch, bn_eps, w1, b1, w2, b2, avg_pool, max_pool,
                  channel_gain, kernel, s_gamma, s_beta, s_mean, s_var, s_batch, s_eps, spatial_gain, relu,
                  save):  # fmt: skip
    N, C, H, W = x.shape
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32

    def optional(present: bool, *shape: int, dtype: torch.dtype = acc) -> Tensor:
        return x.new_empty(shape if present else (0,), dtype=dtype)

    planes = save and (gamma is not None or w1 is not None)
    extrema = save and w1 is not None and max_pool
    return (
        torch.empty_like(dense(x)[0]),
        optional(planes, N, C),
        optional(extrema, N, C, dtype=x.dtype),
        optional(extrema, N, C, dtype=torch.int32),
        optional(gamma is not None and (save or bn_batch), C),
        optional(gamma is not None and (save or bn_batch), C),
        optional(save and w1 is not None, N, C),
        optional(save and kernel is not None, N, 1, H, W),
        optional(kernel is not None and (save or s_batch), 1, dtype=torch.float64),
        optional(kernel is not None and (save or s_batch), 1, dtype=torch.float64),
    )


def _fake_backward(grad, x, out, gamma, beta, bn_batch, bn_eps, w1, b1, w2, b2, avg_pool, max_pool,
                   channel_gain, kernel, s_gamma, s_beta, s_batch, s_eps, spatial_gain, relu, m, e, k, mu, v,
                   gate, s, s_mu, s_v, need_x, need_shortcut):  # fmt: skip
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32

    def like(part: Tensor | None) -> Tensor:
        return x.new_empty((0,) if part is None else part.shape, dtype=acc)

    x = dense(x)[0]
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(x) if need_shortcut else x.new_empty(0),
        *(like(part) for part in (gamma, beta, w1, b1, w2, b2, kernel, s_gamma, s_beta)),
    )


def _on_cuda(x: Tensor, shortcut: Tensor | None, *args: Any):
    from cbam.ops import triton_kernels  # pyright: ignore[reportAttributeAccessIssue]

    _check_devices(x, args)
    x, layout = dense(x)
    return triton_kernels.tail(x, _laid_out(shortcut, layout), *map(_contiguous, args))


def _inference_on_cuda(x: Tensor, shortcut: Tensor | None, *args: Any) -> Tensor:
    from cbam.ops import triton_kernels  # pyright: ignore[reportAttributeAccessIssue]

    _check_devices(x, args)
    x, layout = dense(x)
    return triton_kernels.tail_inference(x, _laid_out(shortcut, layout), *map(_contiguous, args))


def _backward_on_cuda(grad: Tensor, x: Tensor, out: Tensor | None, *args: Any):
    from cbam.ops import triton_gradients  # pyright: ignore[reportAttributeAccessIssue]

    x, layout = dense(x)
    maps = _laid_out(grad, layout), x, _laid_out(out, layout)
    return triton_gradients.tail_backward(*maps, *map(_contiguous, args))


def _track_on_cuda(running: list[Tensor], new: list[Tensor], momenta: list[float], count: int) -> None:
    from cbam.ops import triton_kernels  # pyright: ignore[reportAttributeAccessIssue]

    updated = [t.contiguous() for t in running]
    triton_kernels.track(updated, [t.contiguous() for t in new], momenta, count)
    for original, result in zip(running, updated, strict=True):
        if result is not original:
            original.copy_(result)


def _check_devices(x: Tensor, args: tuple) -> None:
    """Raise if a parameter is not on the device of `x`: a kernel would read invalid memory."""
    device = x.device
    for value in args:
        if isinstance(value, Tensor) and value.device != device:
            raise InputError(f"x is on {device}, a parameter is on {value.device}; move one of them")


def _meta(fake: Callable) -> Callable:
    """The Meta kernel of an operator. torch also calls it for a map with data if a parameter is on meta."""

    def checked(x: Tensor, *args: Any) -> Any:
        _check_devices(x, args)
        return fake(x, *args)

    return checked


def _laid_out(t: Any, layout: torch.memory_format) -> Any:
    return None if t is None else t.contiguous(memory_format=layout)


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


_library.impl("tail", _autograd, "Autograd")
_library.impl("tail", _on_cuda, "CUDA")
_library.impl("tail_inference", _inference_on_cuda, "CUDA")
_library.impl("tail_backward", _backward_on_cuda, "CUDA")
_library.impl("track_", _track_on_cuda, "CUDA")
# Meta kernels also serve fake tensors; register_fake would import half of torch's compiler.
_library.impl("tail", _meta(_fake_forward), "Meta")
_library.impl("tail_inference", _meta(lambda x, *_: torch.empty_like(dense(x)[0])), "Meta")
_library.impl("tail_", _meta(lambda *_: None), "Meta")
_library.impl("tail_backward", _fake_backward, "Meta")
_library.impl("track_", lambda *_: None, "Meta")
