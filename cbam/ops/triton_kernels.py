"""The fused residual tail on a GPU: which Triton kernels run, in which order, on which buffers.

    y = BN(x);  z = Mc y;  v = z Ms + shortcut;  out = relu(v)

Each part is optional. The kernels are in triton_forward.py and triton_gate.py, their tiles in triton_plan.py;
triton_gradients.py launches those of the backward. Nothing here waits for the device, and no decision depends
on its results.
"""

import struct
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cbam.ops import triton_forward as forward
from cbam.ops import triton_gate as gates
from cbam.ops.triton_map import ABSENT, Map, Norm, bias, kernels_for, on
from cbam.ops.triton_plan import blocks, gate_plan, statistics_plan


def tail(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`cbam::tail`: out, m, e, k, mu, v, gate, s, s_mu, s_v; absent ones have shape (0,)."""
    with on(x.device):
        return _tail(Map.of(x, *arguments), *arguments)


def tail_inference(
    x: Tensor, shortcut: Tensor | None,
    shortcut_gamma: Tensor | None, shortcut_beta: Tensor | None,
    shortcut_mean: Tensor | None, shortcut_var: Tensor | None, shortcut_eps: float,
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None, bn_eps: float,
    w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None,
    avg_pool: bool, max_pool: bool, channel_gain: float,
    kernel: Tensor | None, s_gamma: Tensor | None, s_beta: Tensor | None,
    s_mean: Tensor | None, s_var: Tensor | None, s_eps: float, spatial_gain: float, relu: bool,
) -> Tensor:  # fmt: skip
    """`cbam::tail_inference`: out."""
    added = Norm(shortcut_gamma, bias(shortcut_gamma, shortcut_beta), shortcut_mean, shortcut_var)
    arguments = (
        shortcut, gamma, beta, mean, var, False, bn_eps, w1, b1, w2, b2, avg_pool, max_pool, channel_gain,
        kernel, s_gamma, s_beta, s_mean, s_var, False, s_eps, spatial_gain, relu, False,
    )  # fmt: skip
    with on(x.device):
        return _tail(Map.of(x, *arguments, *added, shortcut_eps), *arguments, added, shortcut_eps)[0]


def _tail(
    a: Map, shortcut: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None,
    bn_batch: bool, bn_eps: float,
    w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None,
    avg_pool: bool, max_pool: bool, channel_gain: float,
    kernel: Tensor | None, s_gamma: Tensor | None, s_beta: Tensor | None,
    s_mean: Tensor | None, s_var: Tensor | None, s_batch: bool, s_eps: float, spatial_gain: float,
    relu: bool, save: bool, added: Norm = ABSENT, added_eps: float = 0.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `cbam::tail` returns. `added`: a norm to apply to the shortcut first; it has no backward."""
    beta, s_beta = bias(gamma, beta), bias(s_gamma, s_beta)
    batch, s_batch = gamma is not None and bn_batch, kernel is not None and s_batch
    m = e = k = gate = q = s = scale = None
    shift = beta
    if batch or w1 is not None:
        m, moments, e, k = _pool(
            a, gamma, moments=batch, top=w1 is not None and max_pool, nans=not avg_pool
        )  # fmt: skip
        if batch:
            mean, var, scale = _statistics(a, m, moments, gamma, bn_eps, scaled=w1 is None)
    norm = Norm(gamma, beta, mean, var)
    if w1 is not None:
        m, e, k, gate, scale, shift = _gate(
            a, m, e, k, norm, bn_eps, (w1, b1, w2, b2), avg_pool, channel_gain, save
        )  # fmt: skip
    elif gamma is not None and not batch:
        scale = _affine(a, norm, bn_eps)
    terms = (mean, scale, shift) if gamma is not None else (None, scale, None)
    if kernel is not None:
        q, ticket = _squeeze(a, terms, s_batch, gated=w1 is not None)
        if s_batch or not a.plan.fold:
            s, s_mean, s_var = _convolve(a, q, kernel, ticket, s_mean, s_var)
            q = None
        elif save:
            s = _map_of_pixels(a)
    spatial = Norm(s_gamma, s_beta, s_mean, s_var)
    out = a.alike()
    a.sweep(
        forward.refine, a.plan.refine, a.x, shortcut, *added, *terms, q, kernel, s, *spatial, out, a.W,
        GATED=w1 is not None, ADD_EPS=added_eps, S_EPS=s_eps, GAIN=spatial_gain, RELU=relu,
        KS=_side(kernel), QS=a.plan.squeeze.parts, CS=a.plan.refine.parts,
    )  # fmt: skip
    if save and w1 is None and gamma is not None and not (batch and a.plan.pool.parts == 1):
        # The schema requires m, although no gradient needs it.
        m = a.x.mean((2, 3), dtype=a.acc)
    saved = zip((m, e, k, gate, s), (a.acc, a.x.dtype, torch.int32, a.acc, a.acc), strict=True)
    m, e, k, gate, s = (t if save and t is not None else a.absent(dtype) for t, dtype in saved)
    mu, v = _kept(a, norm, a.acc, fresh=batch, save=save)
    s_mu, s_v = _kept(a, spatial, torch.float64, fresh=s_batch, save=save)
    return out, m, e, k, mu, v, gate, s, s_mu, s_v


def track(running: list[Tensor], new: list[Tensor], momenta: list[float], count: int) -> None:
    """`cbam::track_`, for one norm or for the map's and the convolution's."""
    C = len(running[0])
    tensors = (*running[:2], *new[:2], *(running[2:] or (None, None)), *(new[2:] or (None, None)))
    # Two halves of a double, because kernels receive numbers as float32.
    halves = [half for m in (momenta[0], momenta[-1]) for half in (_single(m), m - _single(m))]
    with on(running[0].device):
        alike = kernels_for(running[0].device, *tensors, count)
        alike.launch(forward.track, blocks(C, 256), *tensors, C, count, *halves, BC=256)


def _single(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def probe(device: torch.device) -> None:
    """Compile and launch one kernel on `device`; errors of the compiler and the driver propagate."""
    with on(device), _disable_current_modes():  # a fake tensor mode would not use the device
        a = Map.of(torch.ones(1, 1, 1, 1, device=device))
        _pool(a, None, moments=False, top=True, nans=False)


def _pool(a: Map, gamma: Tensor | None, *, moments: bool, top: bool, nans: bool) -> tuple[Tensor | None, ...]:
    """Pass A: m, M2, e, k of the parts of each plane, (N, parts, C)."""
    tile = a.plan.pool
    size = (a.N, tile.parts, a.C) if tile.parts > 1 else (a.N, a.C)
    m, M2 = a.empty(*size), a.empty(*size) if moments else None
    e, k = (a.empty(*size, dtype=a.x.dtype), a.empty(*size, dtype=torch.int32)) if top else (None, None)
    a.sweep(forward.pool, tile, a.x, gamma, m, M2, e, k, S=tile.parts, NANS=nans)
    return m, M2, e, k


def _statistics(
    a: Map, m: Tensor | None, M2: Tensor | None, gamma: Tensor | None, eps: float, *, scaled: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """mu and v of the batch, and, if `scaled`, gamma / sqrt(v + eps), (C,)."""
    mu, v, scale = a.empty(a.C), a.empty(a.C), a.empty(a.C) if scaled else None
    rows, channels = statistics_plan(a.C, a.processors)
    a.kernels.launch(
        forward.statistics, blocks(a.C, channels), m, M2, mu, v, gamma, scale, a.N, a.C, a.L,
        a.plan.pool.steps, EPS=eps, S=a.plan.pool.parts, ACC=a.constants["ACC"],
        BR=rows, BC=channels, BP=a.plan.pool.pixels,
    )  # fmt: skip
    return mu, v, scale


def _affine(a: Map, norm: Norm, eps: float) -> Tensor:
    """gamma / sqrt(var + eps), (C,), of running statistics."""
    scale = a.empty(a.C)
    constants = {"EPS": eps, "ACC": a.constants["ACC"], "BC": 256}
    a.kernels.launch(forward.affine, blocks(a.C, 256), norm.gamma, norm.var, scale, a.C, **constants)
    return scale


def _gate(
    a: Map, m: Tensor | None, e: Tensor | None, k: Tensor | None, norm: Norm, eps: float,
    weights: tuple[Tensor | None, ...], avg: bool, gain: float, save: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """m, e, k, Mc, and z's scale and shift, (N, C); the first three of whole planes if saved."""
    w1, b1, w2, b2 = weights
    assert w1 is not None
    H, tile, parts = len(w1), a.plan.pool, (m, e, k)
    block = gate_plan(a.N, a.C, H, a.acc.itemsize, a.processors)
    whole: tuple[Tensor | None, ...] = (None, None, None)
    if tile.parts > 1 and save:
        whole = tuple(None if t is None else a.empty(a.N, a.C, dtype=t.dtype) for t in parts)
    gate, act = a.empty(a.N, a.C), None if block.single_kernel else a.empty(a.N, H)
    scale, shift = (a.empty(a.N, a.C), a.empty(a.N, a.C)) if norm.gamma is not None else (None, None)
    sizes = (a.N, a.C, a.L, H, tile.steps)
    constants = {
        "EPS": eps, "S": tile.parts, "AVG": avg, "ACC": a.constants["ACC"],
        "BN": block.samples, "BH": block.hidden, "BC": block.channels, "BP": tile.pixels,
        "num_warps": block.warps,
    }  # fmt: skip
    programs = blocks(a.N, block.samples)
    if act is not None:
        a.kernels.launch(
            gates.hidden, programs * blocks(H, block.hidden), *parts, *whole, *norm, w1, b1, act, *sizes,
            **constants,
        )  # fmt: skip
        programs *= blocks(a.C, block.channels)
    a.kernels.launch(
        gates.gate, programs, *parts, *whole, *norm, w1, b1, w2, b2, act, gate, scale, shift, *sizes,
        GAIN=gain, POOLS=int(avg) + int(e is not None), **constants,
    )  # fmt: skip
    return *(whole if tile.parts > 1 else parts), gate, gate if scale is None else scale, shift


def _squeeze(
    a: Map, terms: tuple[Tensor | None, ...], batch: bool, *, gated: bool
) -> tuple[Tensor, Tensor | None]:
    """Pass B: q (N, parts, 2, L), and the ticket of the convolution, reset to zero."""
    tile = a.plan.squeeze
    q = a.empty(a.N, tile.parts, 2, a.L)
    ticket = a.empty(1, dtype=torch.int32) if batch else None
    a.sweep(forward.squeeze, tile, a.x, *terms, q, ticket, GATED=gated, CS=tile.parts)
    return q, ticket


def _convolve(
    a: Map, q: Tensor, kernel: Tensor, ticket: Tensor | None, mean: Tensor | None, var: Tensor | None
) -> tuple[Tensor | None, ...]:
    """s (N, 1, H, W); its mean and variance over the batch, (1,), where there is a ticket."""
    programs, s, sums = a.N * blocks(a.L, a.plan.conv), _map_of_pixels(a), None
    if ticket is not None:
        sums = a.empty(programs, 2, dtype=torch.float64)
        mean, var = a.empty(1, dtype=torch.float64), a.empty(1, dtype=torch.float64)
    a.kernels.launch(
        forward.convolve, programs, q, kernel, sums, ticket, s, mean, var, a.N, a.L, a.W,
        KS=_side(kernel), CS=a.plan.squeeze.parts, ACC=a.constants["ACC"], BP=a.plan.conv, BR=4 * a.plan.conv,
    )  # fmt: skip
    return s, mean, var


def _map_of_pixels(a: Map) -> Tensor:
    return a.empty(a.N, 1, a.L // a.W, a.W)


def _side(kernel: Tensor | None) -> int:
    return 1 if kernel is None else kernel.shape[-1]


def _kept(a: Map, norm: Norm, dtype: torch.dtype, *, fresh: bool, save: bool) -> tuple[Tensor, Tensor]:
    """The statistics of the batch, or a copy of the running ones where a backward follows."""
    mean, var = norm.mean, norm.var
    if fresh and mean is not None and var is not None:
        return mean, var
    if save and mean is not None and var is not None:
        return mean.to(dtype, copy=True), var.to(dtype, copy=True)
    return a.absent(dtype), a.absent(dtype)
