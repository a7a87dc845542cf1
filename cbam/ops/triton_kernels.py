"""The fused residual tail on a GPU: which Triton kernels run, in which order, on which buffers.

    y = BN(x);  z = Mc y;  v = z Ms + shortcut;  out = relu(v)

Each part is there or not. The kernels are in triton_forward.py, triton_gate.py and triton_backward.py, their
tiles in triton_plan.py. Nothing here waits for the device, and no decision depends on its results.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from cbam.ops import triton_backward as backward
from cbam.ops import triton_forward as forward
from cbam.ops import triton_gate as gates
from cbam.ops.triton_plan import (
    INTERPRETED,
    Plan,
    Tile,
    blocks,
    gate_plan,
    plan,
    power,
    statistics_plan,
    sums_plan,
)

MANY = 2048  # pairs of sums: more are added up by a kernel of their own, not by every program of the next


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    """Start `programs` of a kernel on the current stream, fusing no product with a sum but by `tl.fma`."""
    kernel[(programs,)](*arguments, num_warps=num_warps, num_stages=2, enable_fp_fusion=False, **constants)


class Norm(NamedTuple):
    """BatchNorm of the map, (C,), or of the convolution's output, (1,): gamma is None where there is none."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None


@dataclass(frozen=True)
class Map:
    """A feature map and how it is worked on: what every step of a pass over it needs."""

    N: int
    C: int
    L: int
    W: int
    plan: Plan
    x: Tensor
    acc: torch.dtype
    constants: dict[str, Any]

    @classmethod
    def of(cls, x: Tensor) -> "Map":
        N, C, H, W = x.shape
        nhwc = not x.is_contiguous()
        assert not nhwc or x.is_contiguous(memory_format=torch.channels_last), "x must be dense"
        worked = plan(N, C, H * W, nhwc, x.itemsize, processors(x.device))
        acc, kind = (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)
        return cls(N, C, H * W, W, worked, x, acc, {"ACC": kind, "NHWC": nhwc, "UNIT": worked.unit})

    @property
    def extents(self) -> tuple[int, int, int]:
        """N, C, L as the passes take them: the contiguous extent in multiples of `unit`."""
        nhwc, unit = self.plan.nhwc, self.plan.unit
        return self.N, self.C // (unit if nhwc else 1), self.L // (1 if nhwc else unit)

    def sweep(self, kernel: Any, tile: Tile, *arguments: Any, **constants: Any) -> None:
        """Launch a pass: its own arguments, then the extents and the steps of a program."""
        wide = tile.pixels * self.C if self.plan.nhwc else tile.channels * self.L
        launch(
            kernel, tile.programs, *arguments, *self.extents, tile.steps,
            BC=tile.channels, BP=tile.pixels, WIDE=wide >= 1 << 31, num_warps=tile.warps,
            **self.constants, **constants,
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.acc, device=self.x.device)

    def alike(self) -> Tensor:
        """A map of the same shape, type and layout."""
        return torch.empty_like(self.x)

    def absent(self, dtype: torch.dtype | None = None) -> Tensor:
        """An output that does not exist."""
        return self.empty(0, dtype=dtype)


@lru_cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a device; the CPU, where kernels are interpreted, counts as a small one."""
    if device.type == "cpu":
        return INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count


def on(device: torch.device) -> AbstractContextManager:
    """Make `device` the current one; nothing to do where it is, or where kernels are interpreted."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def tail(
    x: Tensor, shortcut: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None,
    bn_batch: bool, bn_eps: float,
    w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None,
    avg_pool: bool, max_pool: bool, channel_gain: float,
    kernel: Tensor | None, s_gamma: Tensor | None, s_beta: Tensor | None,
    s_mean: Tensor | None, s_var: Tensor | None, s_batch: bool, s_eps: float, spatial_gain: float,
    relu: bool, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`cbam::tail`: out, m, e, k, mu, v, gate, s, s_mu, s_v; what does not exist is of shape (0,)."""
    with on(x.device):
        a = Map.of(x)
        batch, s_batch = gamma is not None and bn_batch, kernel is not None and s_batch
        m = e = k = gate = q = s = None
        if batch or w1 is not None:
            m, moments, e, k = _pool(
                a, gamma, moments=batch, top=w1 is not None and max_pool, nans=not avg_pool
            )
            if batch:
                mean, var = _statistics(a, m, moments)
        norm = Norm(gamma, beta, mean, var)
        if w1 is not None:
            m, e, k, gate = _gate(
                a, m, e, k, norm, bn_eps, (w1, b1, w2, b2), avg_pool, channel_gain, save
            )  # fmt: skip
        if kernel is not None:
            q, ticket = _squeeze(a, norm, bn_eps, gate, s_batch)
            if s_batch or not a.plan.fold:
                s, s_mean, s_var = _convolve(a, q, kernel, ticket, s_mean, s_var)
                q = None
            elif save:
                s = _map_of_pixels(a)
        spatial = Norm(s_gamma, s_beta, s_mean, s_var)
        out = a.alike()
        a.sweep(
            forward.refine, a.plan.refine, x, shortcut, *norm, gate, q, kernel, s, *spatial, out, a.W,
            EPS=bn_eps, S_EPS=s_eps, GAIN=spatial_gain, RELU=relu, KS=_side(kernel), QS=a.plan.squeeze.parts,
            CS=a.plan.refine.parts,
        )  # fmt: skip
        if save and w1 is None and gamma is not None and not (batch and a.plan.pool.parts == 1):
            # The schema wants m, which no gradient does.
            m = x.mean((2, 3), dtype=a.acc)
        saved = zip((m, e, k, gate, s), (a.acc, x.dtype, torch.int32, a.acc, a.acc), strict=True)
        m, e, k, gate, s = (t if save and t is not None else a.absent(dtype) for t, dtype in saved)
        mu, v = _kept(a, norm, a.acc, fresh=batch, save=save)
        s_mu, s_v = _kept(a, spatial, torch.float64, fresh=s_batch, save=save)
        return out, m, e, k, mu, v, gate, s, s_mu, s_v


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


def _statistics(a: Map, m: Tensor | None, M2: Tensor | None) -> tuple[Tensor, Tensor]:
    """mu and v (C,) of the batch."""
    mu, v = a.empty(a.C), a.empty(a.C)
    rows, channels = statistics_plan(a.C, processors(a.x.device))
    launch(
        forward.statistics, blocks(a.C, channels), m, M2, mu, v, a.N, a.C, a.L, a.plan.pool.steps,
        S=a.plan.pool.parts, ACC=a.constants["ACC"], BR=rows, BC=channels, BP=a.plan.pool.pixels,
    )  # fmt: skip
    return mu, v


def _gate(
    a: Map, m: Tensor | None, e: Tensor | None, k: Tensor | None, norm: Norm, eps: float,
    weights: tuple[Tensor | None, ...], avg: bool, gain: float, save: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """m, e, k and Mc, (N, C); the first three are those of whole planes, where they are to be saved."""
    w1, b1, w2, b2 = weights
    assert w1 is not None
    H, tile, parts = len(w1), a.plan.pool, (m, e, k)
    block = gate_plan(a.N, a.C, H, processors(a.x.device))
    whole: tuple[Tensor | None, ...] = (None, None, None)
    if tile.parts > 1 and save:
        whole = tuple(None if t is None else a.empty(a.N, a.C, dtype=t.dtype) for t in parts)
    gate, act = a.empty(a.N, a.C), None if block.alone else a.empty(a.N, H)
    sizes = (a.N, a.C, a.L, H, tile.steps)
    constants = {
        "EPS": eps, "S": tile.parts, "AVG": avg, "ACC": a.constants["ACC"],
        "BN": block.samples, "BH": block.hidden, "BC": block.channels, "BP": tile.pixels,
    }  # fmt: skip
    programs = blocks(a.N, block.samples)
    if act is not None:
        launch(
            gates.hidden, programs * blocks(H, block.hidden), *parts, *whole, *norm, w1, b1, act, *sizes,
            **constants,
        )  # fmt: skip
        programs *= blocks(a.C, block.channels)
    launch(
        gates.gate, programs, *parts, *whole, *norm, w1, b1, w2, b2, act, gate, *sizes,
        GAIN=gain, POOLS=int(avg) + int(e is not None), **constants,
    )  # fmt: skip
    return *(whole if tile.parts > 1 else parts), gate


def _squeeze(
    a: Map, norm: Norm, eps: float, gate: Tensor | None, batch: bool
) -> tuple[Tensor, Tensor | None]:
    """Pass B: q (N, parts, 2, L), and the ticket of the convolution, at zero."""
    tile = a.plan.squeeze
    q = a.empty(a.N, tile.parts, 2, a.L)
    ticket = a.empty(1, dtype=torch.int32) if batch else None
    a.sweep(forward.squeeze, tile, a.x, *norm, gate, q, ticket, EPS=eps, CS=tile.parts)
    return q, ticket


def _convolve(
    a: Map, q: Tensor, kernel: Tensor, ticket: Tensor | None, mean: Tensor | None, var: Tensor | None
) -> tuple[Tensor | None, ...]:
    """s (N, 1, H, W); its mean and variance over the batch, (1,), where there is a ticket."""
    programs, s, sums = a.N * blocks(a.L, a.plan.conv), _map_of_pixels(a), None
    if ticket is not None:
        sums = a.empty(programs, 2, dtype=torch.float64)
        mean, var = a.empty(1, dtype=torch.float64), a.empty(1, dtype=torch.float64)
    launch(
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
        a, absent = Map.of(x), Norm(None, None, None, None)
        norm = absent if gamma is None else Norm(gamma, beta, mu, v)
        spatial = absent if kernel is None else Norm(s_gamma, s_beta, s_mu, s_v)
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
                _weigh(a, found, norm, bn_eps)
        if w1 is not None:
            _hidden_gradient(a, found, m, e, gate, norm, bn_eps, (w1, b1, w2), pools, channel_gain)
        if found.reduces or kernel is not None:
            _parameters(a, found, m, e, mc, norm, bn_eps, w1, pools, kernel)
        if need_x:
            found.dx = a.alike()
            a.sweep(
                backward.write, a.plan.write, x, grad if found.g is None else found.g, found.dx, *norm, mc,
                conv, *spatial, found.d, found.j, k, found.davg, found.dtop, found.dgamma, found.dbeta,
                EPS=bn_eps, S_EPS=s_eps, GAIN=spatial_gain, BATCH=gamma is not None and bn_batch,
                CS=a.plan.write.parts,
            )  # fmt: skip
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
    davg: Tensor | None = None  # (N, C)
    dtop: Tensor | None = None

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
        launch(backward.totals, 1, found.sums, sums, len(found.sums), BR=1024)  # pyright: ignore
    found.d = a.empty(a.N, 2, a.L)
    found.parts_of_dw = a.empty(tile.programs, 2 * side * side)
    BT = min(tile.channels, power(2 * side * side))
    launch(
        backward.spatial_gradient, tile.programs * blocks(2 * side * side, BT), found.du, s, spatial.gamma,
        spatial.mean, spatial.var, sums, found.q, kernel, found.d, found.parts_of_dw, *found.ds,
        a.N, a.L, a.W, len(sums), tile.steps, S_EPS=eps, S_BATCH=batch, KS=side, ACC=a.constants["ACC"],
        BQ=a.plan.conv, BP=tile.pixels, BT=BT, BR=min(1024, power(len(sums))), num_warps=tile.warps,
    )  # fmt: skip


def _weigh(a: Map, found: Found, norm: Norm, eps: float) -> None:
    """Pass 2."""
    tile, parts = a.plan.weigh, found.r
    assert parts is not None
    found.r = a.empty(a.N, tile.parts, 2, a.C)
    a.sweep(
        backward.weigh, tile, a.x, *norm, found.d, found.j, parts, found.r, parts.shape[1],
        EPS=eps, S=tile.parts, BT=min(16, tile.pixels),
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
    block = gate_plan(a.N, a.C, H, processors(a.x.device))
    found.dl, found.act = a.empty(a.N, a.C), a.empty(a.N, H)
    found.da, found.dm = (a.empty(a.N, H) if there else None for there in pools)
    launch(
        gates.hidden_gradient, blocks(a.N, block.samples) * blocks(H, block.hidden), found.r, m, e, gate,
        *norm, w1, b1, w2, found.dl, found.act, found.da, found.dm, a.N, a.C, a.L, H, found.r.shape[1],
        EPS=eps, GAIN=gain, AVG=pools[0], MAX=pools[1], ACC=a.constants["ACC"],
        BN=block.samples, BH=block.hidden, BC=block.channels,
    )  # fmt: skip


def _parameters(
    a: Map, found: Found, m: Tensor, e: Tensor, mc: Tensor | None, norm: Norm, eps: float,
    w1: Tensor | None, pools: tuple[bool, bool], kernel: Tensor | None,
) -> None:  # fmt: skip
    """The gate's gradient by channels, BatchNorm's, and the last sum of the spatial kernel's."""
    H, dw = 1 if w1 is None else len(w1), found.parts_of_dw
    samples, hidden, channels = sums_plan(a.N, H, processors(a.x.device))
    found.davg, found.dtop = (a.empty(a.N, a.C) if there else None for there in pools)
    programs = int(dw is not None)
    if found.reduces:
        programs += blocks(a.C, channels) * blocks(H, hidden)
    launch(
        gates.parameter_gradients, programs, found.r, m, e, mc, *norm, w1, found.dl, found.act, found.da,
        found.dm, dw, found.davg, found.dtop, *found.weights, found.dgamma, found.dbeta, found.dkernel,
        a.N, a.C, a.L, H, 1 if found.r is None else found.r.shape[1],
        0 if kernel is None else kernel.numel(), 0 if dw is None else len(dw),
        EPS=eps, POOLS=sum(pools), AVG=pools[0], MAX=pools[1], ACC=a.constants["ACC"],
        BN=samples, BH=hidden, BC=channels, BR=32, BT=32,
    )  # fmt: skip
