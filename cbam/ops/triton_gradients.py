"""Backward of the fused residual tail on a GPU: which Triton kernels run, in which order, on which buffers.

The steps and their sums are in triton_backward.py and triton_gate.py, their tiles in triton_plan.py. Nothing
here waits for the device, and no decision depends on its results.
"""

from typing import Any

import torch
from torch import Tensor

from cbam.ops import triton_backward as backward
from cbam.ops import triton_gate as gates
from cbam.ops.triton_map import ABSENT, Map, Norm, bias, on
from cbam.ops.triton_plan import blocks, gate_plan, power, sums_plan

TAPS = 32  # of the spatial kernel, whose gradients one program sums
MANY = 2048  # pairs of sums: a separate kernel adds up more, instead of every program of the next one


def tail_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`cbam::tail_backward`: dx, g, the nine parameters' gradients; absent ones have shape (0,)."""
    with on(x.device):
        return _tail_backward(Map.of(x, grad, *arguments), grad, *arguments)


def _tail_backward(
    a: Map, grad: Tensor, out: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, bn_batch: bool, bn_eps: float,
    w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None,
    avg_pool: bool, max_pool: bool, channel_gain: float,
    kernel: Tensor | None, s_gamma: Tensor | None, s_beta: Tensor | None,
    s_batch: bool, s_eps: float, spatial_gain: float, relu: bool,
    m: Tensor, e: Tensor, k: Tensor, mu: Tensor, v: Tensor, gate: Tensor,
    s: Tensor, s_mu: Tensor, s_v: Tensor, need_x: bool, need_shortcut: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    norm = ABSENT if gamma is None else Norm(gamma, bias(gamma, beta), mu, v)
    spatial = ABSENT if kernel is None else Norm(s_gamma, bias(s_gamma, s_beta), s_mu, s_v)
    pools = (w1 is not None and avg_pool, w1 is not None and max_pool)
    mc, conv = None if w1 is None else gate, None if kernel is None else s
    state = State(a, w1, gamma, kernel)
    if relu and (need_x or need_shortcut):
        state.g = a.alike()
    if relu or state.reduces or kernel is not None:
        _reduce(a, state, grad, out if relu else None, norm, bn_eps, mc, conv, spatial, s_eps, spatial_gain)
    if kernel is not None:
        _spatial_step(a, state, kernel, conv, spatial, s_eps, s_batch)
        if state.reduces:
            _weigh(a, state, norm.mean)
    if w1 is not None:
        _hidden_gradient(a, state, m, e, gate, norm, bn_eps, (w1, b1, w2), pools, channel_gain)
    if state.reduces or kernel is not None:
        batch = gamma is not None and bn_batch
        _parameters(a, state, m, e, mc, norm, bn_eps, w1, pools, kernel, batch=batch, need_x=need_x)
    if need_x:
        state.dx = a.alike()
        a.sweep(
            backward.write, a.plan.write, a.x, norm.mean, grad if state.g is None else state.g, state.dx,
            conv, *spatial, state.d, state.j, k, state.scale, state.level, state.peak, state.slope,
            S_EPS=s_eps, GAIN=spatial_gain, CS=a.plan.write.parts,
        )  # fmt: skip
    if beta is None:
        state.dbeta = None
    if s_beta is None:
        state.ds[1] = a.absent()
    return state.returned(a.x.dtype, need_shortcut)


class State:
    """What the steps of a backward have computed so far; None for what is absent."""

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
        g = self.g if need_shortcut else None  # else it was written only for pass 3
        maps = (self.absent(dtype) if t is None else t for t in (self.dx, g))
        norm = (self.absent() if t is None else t for t in (self.dgamma, self.dbeta))
        return (*maps, *norm, *self.weights, self.dkernel, *self.ds)


def _reduce(
    a: Map, state: State, grad: Tensor, out: Tensor | None, norm: Norm, eps: float, mc: Tensor | None,
    s: Tensor | None, spatial: Norm, s_eps: float, gain: float,
) -> None:  # fmt: skip
    """Pass 1."""
    tile = a.plan.gradient
    tiles = blocks(a.L, tile.pixels)
    if state.reduces:
        state.r = a.empty(a.N, tiles, 2, a.C)
    if s is not None:
        state.q, state.du = a.empty(a.N, 2, a.L), a.empty(a.N, a.L)
        state.j = a.empty(a.N, a.L, dtype=torch.int32)
        state.sums = a.empty(a.N * tiles, 2, dtype=torch.float64)
    a.sweep(
        backward.reduce_gradient, tile, a.x, grad, out, state.g, *norm, mc, s, *spatial,
        state.q, state.j, state.du, state.sums, state.r, EPS=eps, S_EPS=s_eps, GAIN=gain,
    )  # fmt: skip


def _spatial_step(
    a: Map, state: State, kernel: Tensor, s: Tensor | None, spatial: Norm, eps: float, batch: bool
) -> None:
    """The spatial step."""
    tile, side, sums = a.plan.spread, kernel.shape[-1], state.sums
    assert sums is not None
    most = len(sums) // a.N * power(a.N)  # for any batch with the same plan, so that none recompiles
    if most > MANY:
        sums, most = a.empty(1, 2, dtype=torch.float64), 1
        a.kernels.launch(backward.totals, 1, state.sums, sums, len(state.sums), BR=1024)  # pyright: ignore
    state.d = a.empty(a.N, 2, a.L)
    state.parts_of_dw = a.empty(tile.programs, 2 * side * side)
    BT = min(tile.channels, power(2 * side * side))
    a.kernels.launch(
        backward.spatial_gradient, tile.programs * blocks(2 * side * side, BT), state.du, s, spatial.gamma,
        spatial.mean, spatial.var, sums, state.q, kernel, state.d, state.parts_of_dw, *state.ds,
        a.N, a.C, a.L, a.W, len(sums), tile.steps, S_EPS=eps, S_BATCH=batch, KS=side, ACC=a.constants["ACC"],
        BQ=a.plan.conv, BP=tile.pixels, BT=BT, BR=min(1024, power(most)), num_warps=tile.warps,
    )  # fmt: skip


def _weigh(a: Map, state: State, mu: Tensor | None) -> None:
    """Pass 2."""
    tile, parts = a.plan.weigh, state.r
    assert parts is not None
    state.r = a.empty(a.N, tile.parts, 2, a.C)
    a.sweep(
        backward.weigh, tile, a.x, mu, state.d, state.j, parts, state.r, parts.shape[1],
        S=tile.parts, BT=min(16, tile.pixels),
    )  # fmt: skip


def _hidden_gradient(
    a: Map, state: State, m: Tensor, e: Tensor, gate: Tensor, norm: Norm, eps: float,
    weights: tuple[Tensor | None, ...], pools: tuple[bool, bool], gain: float,
) -> None:  # fmt: skip
    """The gate's gradient by samples."""
    w1, b1, w2 = weights
    assert w1 is not None
    assert state.r is not None
    H = len(w1)
    block = gate_plan(a.N, a.C, H, a.acc.itemsize, a.processors)
    state.dl, state.act = a.empty(a.N, a.C), a.empty(a.N, H)
    state.da, state.dm = (a.empty(a.N, H) if used else None for used in pools)
    a.kernels.launch(
        gates.hidden_gradient, blocks(a.N, block.samples) * blocks(H, block.hidden), state.r, m, e, gate,
        *norm, w1, b1, w2, state.dl, state.act, state.da, state.dm, a.N, a.C, a.L, H, state.r.shape[1],
        EPS=eps, GAIN=gain, AVG=pools[0], MAX=pools[1], ACC=a.constants["ACC"],
        BN=block.samples, BH=block.hidden, BC=block.channels, num_warps=block.warps,
    )  # fmt: skip


def _parameters(
    a: Map, state: State, m: Tensor, e: Tensor, mc: Tensor | None, norm: Norm, eps: float,
    w1: Tensor | None, pools: tuple[bool, bool], kernel: Tensor | None, *, batch: bool, need_x: bool,
) -> None:  # fmt: skip
    """The gate's gradient by channels, BatchNorm's, and the last sum of the spatial kernel's."""
    H, dw = 1 if w1 is None else len(w1), state.parts_of_dw
    block = sums_plan(a.N, H, a.processors)
    wanted = (state.reduces, pools[0] or batch, pools[1])
    state.scale, state.level, state.peak = (a.empty(a.N, a.C) if need_x and w else None for w in wanted)
    state.slope = a.empty(a.C) if need_x and batch else None
    taps = 0 if kernel is None else kernel.numel()
    programs = 0 if dw is None else blocks(taps, TAPS)
    if state.reduces:
        programs += blocks(a.C, block.channels) * blocks(H, block.hidden)
    a.kernels.launch(
        gates.parameter_gradients, programs, state.r, m, e, mc, *norm, w1, state.dl, state.act, state.da,
        state.dm, dw, state.scale, state.level, state.peak, state.slope, *state.weights,
        state.dgamma, state.dbeta, state.dkernel,
        a.N, a.C, a.L, H, 1 if state.r is None else state.r.shape[1],
        taps, 0 if dw is None else len(dw),
        EPS=eps, BATCH=batch, POOLS=sum(pools), AVG=pools[0], MAX=pools[1], ACC=a.constants["ACC"],
        BN=block.samples, BH=block.hidden, BC=block.channels, BR=128, BT=TAPS, num_warps=block.warps,
    )  # fmt: skip
