"""The fused residual tail on a GPU: which Triton kernels run, in which order, on which buffers.

    y = BN(x);  z = Mc y;  v = z Ms + shortcut;  out = relu(v)

Each part is there or not. The kernels are in triton_forward.py, triton_gate.py and triton_backward.py, their
tiles in triton_plan.py. Nothing here waits for the device, and no decision depends on its results.
"""

import struct

import torch
from torch import Tensor

from cbam.ops import triton_backward as backward
from cbam.ops import triton_forward as forward
from cbam.ops import triton_gate as gates
from cbam.ops.triton_map import Map, Norm, on
from cbam.ops.triton_plan import blocks, gate_plan, power, statistics_plan, sums_plan

TAPS = 32  # of the spatial kernel, whose gradients one program adds up
MANY = 2048  # pairs of sums: more are added up by a kernel of their own, not by every program of the next
ABSENT = Norm(None, None, None, None)


def tail(
    x: Tensor, shortcut: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None,
    bn_batch: bool, bn_eps: float,
    w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None,
    avg_pool: bool, max_pool: bool, channel_gain: float,
    kernel: Tensor | None, s_gamma: Tensor | None, s_beta: Tensor | None,
    s_mean: Tensor | None, s_var: Tensor | None, s_batch: bool, s_eps: float, spatial_gain: float,
    relu: bool, save: bool, added: Norm = ABSENT, added_eps: float = 0.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`cbam::tail`: out, m, e, k, mu, v, gate, s, s_mu, s_v; what does not exist is of shape (0,).

    `added` is a norm that the shortcut still has to pass; no backward knows of it.
    """
    with on(x.device):
        a = Map.of(x)
        beta, s_beta = _bias(gamma, beta), _bias(s_gamma, s_beta)
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
            forward.refine, a.plan.refine, x, shortcut, *added, *terms, q, kernel, s, *spatial, out, a.W,
            GATED=w1 is not None, ADD_EPS=added_eps, S_EPS=s_eps, GAIN=spatial_gain, RELU=relu,
            KS=_side(kernel), QS=a.plan.squeeze.parts, CS=a.plan.refine.parts,
        )  # fmt: skip
        if save and w1 is None and gamma is not None and not (batch and a.plan.pool.parts == 1):
            # The schema wants m, which no gradient does.
            m = x.mean((2, 3), dtype=a.acc)
        saved = zip((m, e, k, gate, s), (a.acc, x.dtype, torch.int32, a.acc, a.acc), strict=True)
        m, e, k, gate, s = (t if save and t is not None else a.absent(dtype) for t, dtype in saved)
        mu, v = _kept(a, norm, a.acc, fresh=batch, save=save)
        s_mu, s_v = _kept(a, spatial, torch.float64, fresh=s_batch, save=save)
        return out, m, e, k, mu, v, gate, s, s_mu, s_v


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
    added = Norm(shortcut_gamma, _bias(shortcut_gamma, shortcut_beta), shortcut_mean, shortcut_var)
    return tail(
        x, shortcut, gamma, beta, mean, var, False, bn_eps,
        w1, b1, w2, b2, avg_pool, max_pool, channel_gain,
        kernel, s_gamma, s_beta, s_mean, s_var, False, s_eps, spatial_gain, relu, False, added, shortcut_eps,
    )[0]  # fmt: skip


def _bias(weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The bias of a norm; zeros where it has a weight alone."""
    return torch.zeros_like(weight) if weight is not None and bias is None else bias


def track(running: list[Tensor], new: list[Tensor], momenta: list[float], count: int) -> None:
    """`cbam::track_`, for one norm or for the map's and the convolution's."""
    C = len(running[0])
    tensors = (*running[:2], *new[:2], *(running[2:] or (None, None)), *(new[2:] or (None, None)))
    # Two halves of a double: a number that is given at run time is a float32.
    halves = [half for m in (momenta[0], momenta[-1]) for half in (_single(m), m - _single(m))]
    with on(running[0].device):
        Map.launch(forward.track, blocks(C, 256), *tensors, C, count, *halves, BC=256)


def _single(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def probe(device: torch.device) -> None:
    """Compile and start one kernel on `device`; raises what the compiler or the driver raises."""
    with on(device):
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
    a.launch(
        forward.statistics, blocks(a.C, channels), m, M2, mu, v, gamma, scale, a.N, a.C, a.L,
        a.plan.pool.steps, EPS=eps, S=a.plan.pool.parts, ACC=a.constants["ACC"],
        BR=rows, BC=channels, BP=a.plan.pool.pixels,
    )  # fmt: skip
    return mu, v, scale


def _affine(a: Map, norm: Norm, eps: float) -> Tensor:
    """gamma / sqrt(var + eps), (C,), of running statistics."""
    scale = a.empty(a.C)
    constants = {"EPS": eps, "ACC": a.constants["ACC"], "BC": 256}
    a.launch(forward.affine, blocks(a.C, 256), norm.gamma, norm.var, scale, a.C, **constants)
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
    gate, act = a.empty(a.N, a.C), None if block.alone else a.empty(a.N, H)
    scale, shift = (a.empty(a.N, a.C), a.empty(a.N, a.C)) if norm.gamma is not None else (None, None)
    sizes = (a.N, a.C, a.L, H, tile.steps)
    constants = {
        "EPS": eps, "S": tile.parts, "AVG": avg, "ACC": a.constants["ACC"],
        "BN": block.samples, "BH": block.hidden, "BC": block.channels, "BP": tile.pixels,
        "num_warps": block.warps,
    }  # fmt: skip
    programs = blocks(a.N, block.samples)
    if act is not None:
        a.launch(
            gates.hidden, programs * blocks(H, block.hidden), *parts, *whole, *norm, w1, b1, act, *sizes,
            **constants,
        )  # fmt: skip
        programs *= blocks(a.C, block.channels)
    a.launch(
        gates.gate, programs, *parts, *whole, *norm, w1, b1, w2, b2, act, gate, scale, shift, *sizes,
        GAIN=gain, POOLS=int(avg) + int(e is not None), **constants,
    )  # fmt: skip
    return *(whole if tile.parts > 1 else parts), gate, gate if scale is None else scale, shift


def _squeeze(
    a: Map, terms: tuple[Tensor | None, ...], batch: bool, *, gated: bool
) -> tuple[Tensor, Tensor | None]:
    """Pass B: q (N, parts, 2, L), and the ticket of the convolution, at zero."""
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
    a.launch(
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


def tail_backward(
    grad: Tensor, x: Tensor, out: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, bn_batch: bool, bn_eps: float,
    w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None,
    avg_pool: bool, max_pool: bool, channel_gain: float,
    kernel: Tensor | None, s_gamma: Tensor | None, s_beta: Tensor | None,
    s_batch: bool, s_eps: float, spatial_gain: float, relu: bool,
    m: Tensor, e: Tensor, k: Tensor, mu: Tensor, v: Tensor, gate: Tensor,
    s: Tensor, s_mu: Tensor, s_v: Tensor, need_x: bool, need_shortcut: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`cbam::tail_backward`: dx, g, the nine parameters' gradients; what does not exist is of shape (0,)."""
    with on(x.device):
        a = Map.of(x)
        norm = ABSENT if gamma is None else Norm(gamma, _bias(gamma, beta), mu, v)
        spatial = ABSENT if kernel is None else Norm(s_gamma, _bias(s_gamma, s_beta), s_mu, s_v)
        pools = (w1 is not None and avg_pool, w1 is not None and max_pool)
        mc, conv = None if w1 is None else gate, None if kernel is None else s
        found = Found(a, w1, gamma, kernel)
        if relu and (need_x or need_shortcut):
            found.g = a.alike()
        if relu or found.reduces or kernel is not None:
            _reduce(
                a, found, grad, out if relu else None, norm, bn_eps, mc, conv, spatial, s_eps, spatial_gain
            )
        if kernel is not None:
            _spread(a, found, kernel, conv, spatial, s_eps, s_batch)
            if found.reduces:
                _weigh(a, found, norm.mean)
        if w1 is not None:
            _hidden_gradient(a, found, m, e, gate, norm, bn_eps, (w1, b1, w2), pools, channel_gain)
        if found.reduces or kernel is not None:
            batch = gamma is not None and bn_batch
            _parameters(a, found, m, e, mc, norm, bn_eps, w1, pools, kernel, batch=batch, need_x=need_x)
        if need_x:
            found.dx = a.alike()
            a.sweep(
                backward.write, a.plan.write, x, norm.mean, grad if found.g is None else found.g, found.dx,
                conv, *spatial, found.d, found.j, k, found.scale, found.level, found.peak, found.slope,
                S_EPS=s_eps, GAIN=spatial_gain, CS=a.plan.write.parts,
            )  # fmt: skip
        if beta is None:
            found.dbeta = None
        if s_beta is None:
            found.ds[1] = a.absent()
        return found.returned(x.dtype, need_shortcut)


class Found:
    """What the steps of a backward have computed so far; None where there is no such thing."""

    g: Tensor | None = None
    dx: Tensor | None = None
    q: Tensor | None = None  # (N, 2, L)
    j: Tensor | None = None  # (N, L)
    du: Tensor | None = None  # (N, L)
    sums: Tensor | None = None  # (programs, 2), float64
    r: Tensor | None = None  # (N, parts, 2, C): P and Q, then R0 and R1
    d: Tensor | None = None  # (N, 2, L)
    parts_of_dw: Tensor | None = None  # (parts, 2 KS^2)
    dl: Tensor | None = None  # (N, C)
    act: Tensor | None = None  # (N, H); so are da and dm
    da: Tensor | None = None
    dm: Tensor | None = None
    scale: Tensor | None = None  # (N, C), of pass 3; so are level and peak
    level: Tensor | None = None
    peak: Tensor | None = None
    slope: Tensor | None = None  # (C,)

    def __init__(self, a: Map, w1: Tensor | None, gamma: Tensor | None, kernel: Tensor | None) -> None:
        self.reduces = w1 is not None or gamma is not None
        self.dgamma, self.dbeta = (a.empty(a.C) if gamma is not None else None for _ in range(2))
        H = 0 if w1 is None else len(w1)
        sizes = ((H, a.C), (H,), (a.C, H), (a.C,)) if H else ((0,),) * 4
        self.weights = [a.empty(*size) for size in sizes]
        self.dkernel = a.empty(*(kernel.shape if kernel is not None else (0,)))
        self.ds = [a.empty(int(kernel is not None)) for _ in range(2)]
        self.absent = a.absent

    def returned(self, dtype: torch.dtype, need_shortcut: bool) -> tuple[Tensor, ...]:
        g = self.g if need_shortcut else None  # else it was written for pass 3 alone
        maps = (self.absent(dtype) if t is None else t for t in (self.dx, g))
        norm = (self.absent() if t is None else t for t in (self.dgamma, self.dbeta))
        return (*maps, *norm, *self.weights, self.dkernel, *self.ds)


def _reduce(
    a: Map, found: Found, grad: Tensor, out: Tensor | None, norm: Norm, eps: float, mc: Tensor | None,
    s: Tensor | None, spatial: Norm, s_eps: float, gain: float,
) -> None:  # fmt: skip
    """Pass 1."""
    tile = a.plan.gradient
    tiles = blocks(a.L, tile.pixels)
    if found.reduces:
        found.r = a.empty(a.N, tiles, 2, a.C)
    if s is not None:
        found.q, found.du = a.empty(a.N, 2, a.L), a.empty(a.N, a.L)
        found.j = a.empty(a.N, a.L, dtype=torch.int32)
        found.sums = a.empty(a.N * tiles, 2, dtype=torch.float64)
    a.sweep(
        backward.reduce_gradient, tile, a.x, grad, out, found.g, *norm, mc, s, *spatial,
        found.q, found.j, found.du, found.sums, found.r, EPS=eps, S_EPS=s_eps, GAIN=gain,
    )  # fmt: skip


def _spread(
    a: Map, found: Found, kernel: Tensor, s: Tensor | None, spatial: Norm, eps: float, batch: bool
) -> None:
    """The spatial step."""
    tile, side, sums = a.plan.spread, kernel.shape[-1], found.sums
    assert sums is not None
    if len(sums) > MANY:
        sums = a.empty(1, 2, dtype=torch.float64)
        a.launch(backward.totals, 1, found.sums, sums, len(found.sums), BR=1024)  # pyright: ignore
    found.d = a.empty(a.N, 2, a.L)
    found.parts_of_dw = a.empty(tile.programs, 2 * side * side)
    BT = min(tile.channels, power(2 * side * side))
    a.launch(
        backward.spatial_gradient, tile.programs * blocks(2 * side * side, BT), found.du, s, spatial.gamma,
        spatial.mean, spatial.var, sums, found.q, kernel, found.d, found.parts_of_dw, *found.ds,
        a.N, a.C, a.L, a.W, len(sums), tile.steps, S_EPS=eps, S_BATCH=batch, KS=side, ACC=a.constants["ACC"],
        BQ=a.plan.conv, BP=tile.pixels, BT=BT, BR=min(1024, power(len(sums))), num_warps=tile.warps,
    )  # fmt: skip


def _weigh(a: Map, found: Found, mu: Tensor | None) -> None:
    """Pass 2."""
    tile, parts = a.plan.weigh, found.r
    assert parts is not None
    found.r = a.empty(a.N, tile.parts, 2, a.C)
    a.sweep(
        backward.weigh, tile, a.x, mu, found.d, found.j, parts, found.r, parts.shape[1],
        S=tile.parts, BT=min(16, tile.pixels),
    )  # fmt: skip


def _hidden_gradient(
    a: Map, found: Found, m: Tensor, e: Tensor, gate: Tensor, norm: Norm, eps: float,
    weights: tuple[Tensor | None, ...], pools: tuple[bool, bool], gain: float,
) -> None:  # fmt: skip
    """The gate's gradient by samples."""
    w1, b1, w2 = weights
    assert w1 is not None
    assert found.r is not None
    H = len(w1)
    block = gate_plan(a.N, a.C, H, a.acc.itemsize, a.processors)
    found.dl, found.act = a.empty(a.N, a.C), a.empty(a.N, H)
    found.da, found.dm = (a.empty(a.N, H) if there else None for there in pools)
    a.launch(
        gates.hidden_gradient, blocks(a.N, block.samples) * blocks(H, block.hidden), found.r, m, e, gate,
        *norm, w1, b1, w2, found.dl, found.act, found.da, found.dm, a.N, a.C, a.L, H, found.r.shape[1],
        EPS=eps, GAIN=gain, AVG=pools[0], MAX=pools[1], ACC=a.constants["ACC"],
        BN=block.samples, BH=block.hidden, BC=block.channels, num_warps=block.warps,
    )  # fmt: skip


def _parameters(
    a: Map, found: Found, m: Tensor, e: Tensor, mc: Tensor | None, norm: Norm, eps: float,
    w1: Tensor | None, pools: tuple[bool, bool], kernel: Tensor | None, *, batch: bool, need_x: bool,
) -> None:  # fmt: skip
    """The gate's gradient by channels, BatchNorm's, and the last sum of the spatial kernel's."""
    H, dw = 1 if w1 is None else len(w1), found.parts_of_dw
    block = sums_plan(a.N, H, a.processors)
    wanted = (found.reduces, pools[0] or batch, pools[1])
    found.scale, found.level, found.peak = (a.empty(a.N, a.C) if need_x and w else None for w in wanted)
    found.slope = a.empty(a.C) if need_x and batch else None
    taps = 0 if kernel is None else kernel.numel()
    programs = 0 if dw is None else blocks(taps, TAPS)
    if found.reduces:
        programs += blocks(a.C, block.channels) * blocks(H, block.hidden)
    a.launch(
        gates.parameter_gradients, programs, found.r, m, e, mc, *norm, w1, found.dl, found.act, found.da,
        found.dm, dw, found.scale, found.level, found.peak, found.slope, *found.weights,
        found.dgamma, found.dbeta, found.dkernel,
        a.N, a.C, a.L, H, 1 if found.r is None else found.r.shape[1],
        taps, 0 if dw is None else len(dw),
        EPS=eps, BATCH=batch, POOLS=sum(pools), AVG=pools[0], MAX=pools[1], ACC=a.constants["ACC"],
        BN=block.samples, BH=block.hidden, BC=block.channels, BR=128, BT=TAPS, num_warps=block.warps,
    )  # fmt: skip
