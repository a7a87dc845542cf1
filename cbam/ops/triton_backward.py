"""Triton kernels of the backward: three passes over the feature map, and the spatial step between them.

    reduce_gradient   1   grad, out, x -> g, P, Q, dMs, q, j
    spatial_gradient      dMs, s, q -> d = [d0; d1], the partial sums of dw, d s_gamma, d s_beta
    weigh             2   x -> R0 = P + G, R1 = Q + H
    (the gate)            R0, R1 -> d W1 ... d gamma, davg, dmx          in triton_gate.py
    write             3   g, x -> dx

g = grad where out > 0; P = sum_p g Ms, Q = sum_p g Ms (x - mu), dMs = sum_c g z; weight = d1 / C + (d0 where
channel c is j, the first maximum of its pixel), G = sum_p weight, H = sum_p weight (x - mu). BatchNorm's own
two reductions follow from R0 and R1 without another read. Names and layouts are those of triton_tiles.py.
"""

# Triton's tensors, pointers and constants are not Python types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false, reportReturnType=false

import triton
import triton.language as tl

from cbam.ops.triton_gate import norm_terms
from cbam.ops.triton_tiles import (
    BATCH,
    extents,
    gated,
    load_tile,
    normalised_map,
    origin,
    sigmoid,
    tile_offsets,
    zero_outside,
)


@triton.jit
def forward_terms(GAMMA, BETA, MU, VAR, GATE, n, c, inside, C, EPS: tl.constexpr, ACC: tl.constexpr):
    """mu, scale and shift [BC] of z = scale (x - mu) + shift, from what the forward saved."""
    mu, _, scale, shift = norm_terms(GAMMA, BETA, MU, VAR, c, inside, EPS, ACC)
    if GATE is not None:
        gate = tl.load(GATE + tl.cast(n, tl.int64) * C + c, mask=inside, other=0.0)
        scale = gate * scale
        shift = gate * shift
    return mu, scale, shift


@triton.jit(do_not_specialize=BATCH)
def reduce_gradient(
    X, GRAD, OUTPUT, G, GAMMA, BETA, MU, VAR, GATE, S, S_GAMMA, S_BETA, S_MU, S_VAR, Q, J, DU, SUMS, PQ,
    N, C, L, STEPS,
    EPS: tl.constexpr, S_EPS: tl.constexpr, GAIN: tl.constexpr, ACC: tl.constexpr,
    NHWC: tl.constexpr, UNIT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Pass 1: a program processes all channels of its BP pixels.

    It writes P and Q to PQ (N, tiles, 2, C), one part per tile of pixels, du = dMs Ms' to DU (N, L), and the
    sums of du and of du shat over its pixels to SUMS (programs, 2), in float64 since they cancel.
    """
    C, L = extents(C, L, NHWC, UNIT)
    tiles = tl.cdiv(L, BP)
    pid = tl.program_id(0)
    n, p0 = tl.cast(pid // tiles, tl.int64), pid % tiles * BP
    lc, lp = tl.arange(0, BC), tl.arange(0, BP)
    p, column = p0 + lp, p0 + lp < L
    tile = tile_offsets(lc, lp, C, L, NHWC, WIDE)
    if S is not None:
        s = tl.load(S + n * L + p, mask=column, other=0.0)
        shat, logit = normalised_map(s, S_GAMMA, S_BETA, S_MU, S_VAR, S_EPS, ACC)
        ms = sigmoid(logit, GAIN)
        best = tl.full((BC, BP), float("-inf"), ACC)
        at = tl.zeros((BC, BP), tl.int32)
        total = tl.zeros((BC, BP), ACC)
        dms = tl.zeros((BC, BP), ACC)
    for c0 in range(0, C, BC):
        c, row = c0 + lc, c0 + lc < C
        inside = row[:, None] & column[None, :]
        offset = origin(n, c0, p0, C, L, NHWC) + tile
        g = load_tile(GRAD + offset, inside, EVEN)
        if OUTPUT is not None:
            out = load_tile(OUTPUT + offset, inside, EVEN)
            g = tl.where(out.to(ACC) <= 0, tl.zeros(g.shape, g.dtype), g)
            if G is not None:
                if EVEN:
                    tl.store(G + offset, g)
                else:
                    tl.store(G + offset, g, mask=inside)
        if (S is not None) or (PQ is not None):
            x = load_tile(X + offset, inside, EVEN).to(ACC)
            mu, scale, shift = forward_terms(GAMMA, BETA, MU, VAR, GATE, n, c, row, C, EPS, ACC)
            g_ms = g.to(ACC)
            if S is not None:
                z = gated(x, mu, scale, shift, GAMMA, GATE)
                dms += zero_outside(g_ms * z, inside, EVEN)
                total += zero_outside(z, inside, EVEN)
                better = z > best
                if not EVEN:
                    better = inside & better
                best = tl.where(better, z, best)
                at = tl.where(better, c0, at)
                g_ms = g_ms * ms[None, :]
            if PQ is not None:
                out_pq = PQ + (n * tiles + pid % tiles) * 2 * C + c
                tl.store(out_pq, tl.sum(zero_outside(g_ms, inside, EVEN), 1), mask=row)
                tl.store(
                    out_pq + C, tl.sum(zero_outside(g_ms * (x - mu[:, None]), inside, EVEN), 1), mask=row
                )
    if S is not None:
        top = tl.max(best, 0)
        tl.store(Q + 2 * n * L + p, top, mask=column)
        tl.store(Q + (2 * n + 1) * L + p, tl.sum(total, 0) / C, mask=column)
        first = tl.where(best == top[None, :], at + lc[:, None], 2147483647)
        tl.store(J + n * L + p, tl.min(first, 0), mask=column)
        du = tl.sum(dms, 0) * (ms * (1.0 - ms / GAIN))
        tl.store(DU + n * L + p, du, mask=column)
        wide = tl.where(column, du.to(tl.float64), 0.0)
        tl.store(SUMS + 2 * pid, tl.sum(wide, 0))
        tl.store(SUMS + 2 * pid + 1, tl.sum(tl.where(column, wide * shat.to(tl.float64), 0.0), 0))


@triton.jit
def sum_pairs(SUMS, COUNT, BR: tl.constexpr):
    """The two sums of COUNT pairs, in float64 and in a fixed order."""
    first, second = tl.zeros((BR,), tl.float64), tl.zeros((BR,), tl.float64)
    for start in range(0, COUNT, BR):
        r = start + tl.arange(0, BR)
        first += tl.load(SUMS + 2 * r, mask=r < COUNT, other=0.0)
        second += tl.load(SUMS + 2 * r + 1, mask=r < COUNT, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=BATCH)
def totals(SUMS, OUT, COUNT, BR: tl.constexpr):
    """The two sums of very many pairs, which not every program of the next kernel should compute."""
    first, second = sum_pairs(SUMS, COUNT, BR)
    tl.store(OUT, first)
    tl.store(OUT + 1, second)


@triton.jit
def logit_gradient(
    DU, S, at, ok, factor, r, mean, slope, mu, S_BATCH: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """ds, the gradient of the convolution's output, at pixels `at`; 0 where `ok` is false."""
    du = tl.load(DU + at, mask=ok, other=0.0)
    if S_BATCH:
        shat = (tl.load(S + at, mask=ok, other=0.0) - mu) * r
        du = du - mean - shat * slope
    return tl.where(ok, factor * du, 0.0)


@triton.jit(do_not_specialize=BATCH)
def spatial_gradient(
    DU, S, S_GAMMA, S_MU, S_VAR, SUMS, Q, KERNEL, D, DW, DS_GAMMA, DS_BETA, N, C, L, W, COUNT, STEPS,
    S_EPS: tl.constexpr, S_BATCH: tl.constexpr, KS: tl.constexpr, ACC: tl.constexpr,
    BQ: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """d = [d0; d1 / C] (N, 2, L) by the transposed convolution of ds, and DW (programs, taps), parts of dw.

    A program takes STEPS tiles of BQ pixels of one sample and BT of the 2 KS^2 taps, BP pixels at a time. The
    programs of the first block of taps also compute d of their pixels.
    """
    taps: tl.constexpr = 2 * KS * KS
    blocks: tl.constexpr = (taps + BT - 1) // BT
    chunks = tl.cdiv(L, STEPS * BQ)
    pid = tl.program_id(0)
    block, chunk, n = pid % blocks, pid // blocks % chunks, tl.cast(pid // (blocks * chunks), tl.int64)
    begin = chunk * STEPS * BQ
    end = tl.minimum(L, begin + STEPS * BQ)
    by_one, by_shat = sum_pairs(SUMS, COUNT, BR)
    if pid == 0:
        tl.store(DS_BETA, by_one.to(ACC))
        tl.store(DS_GAMMA, by_shat.to(ACC))
    M = tl.cast(N, tl.float64) * L
    wide_r = 1.0 / tl.sqrt(tl.load(S_VAR).to(tl.float64) + S_EPS)
    r, mu = wide_r.to(ACC), tl.load(S_MU).to(ACC)
    factor = (tl.load(S_GAMMA).to(tl.float64) * wide_r).to(ACC)
    mean, slope = (by_one / M).to(ACC), (by_shat / M).to(ACC)
    DU, S = DU + n * L, S + n * L
    if block == 0:
        for start in range(begin, end, BQ):
            p = start + tl.arange(0, BQ)
            y, x = p // W, p % W
            d0, d1 = tl.zeros((BQ,), ACC), tl.zeros((BQ,), ACC)
            for row in range(KS):
                for column in tl.static_range(KS):
                    yy, xx = y - row + KS // 2, x - column + KS // 2
                    at = yy * W + xx
                    ok = (yy >= 0) & (at < L) & (xx >= 0) & (xx < W) & (p < L)
                    ds = logit_gradient(DU, S, at, ok, factor, r, mean, slope, mu, S_BATCH, ACC)
                    tap = KERNEL + row * KS + column
                    d0 = tl.fma(ds, tl.zeros((BQ,), ACC) + tl.load(tap).to(ACC), d0)
                    d1 = tl.fma(ds, tl.zeros((BQ,), ACC) + tl.load(tap + KS * KS).to(ACC), d1)
            tl.store(D + 2 * n * L + p, d0, mask=p < L)
            tl.store(D + (2 * n + 1) * L + p, d1 / C, mask=p < L)
    t = block * BT + tl.arange(0, BT)
    dy, dx = t % (KS * KS) // KS - KS // 2, t % KS - KS // 2
    dw = tl.zeros((BT, BP), ACC)
    for start in range(begin, end, BP):
        p = start + tl.arange(0, BP)
        y, x = p // W, p % W
        ds = logit_gradient(DU, S, p, p < L, factor, r, mean, slope, mu, S_BATCH, ACC)
        yy, xx = y[None, :] + dy[:, None], x[None, :] + dx[:, None]
        at = yy * W + xx
        ok = (yy >= 0) & (at < L) & (xx >= 0) & (xx < W) & (p < L)[None, :] & (t < taps)[:, None]
        q = tl.load(Q + 2 * n * L + (t // (KS * KS))[:, None] * L + at, mask=ok, other=0.0)
        dw += tl.where(ok, q * ds[None, :], 0.0)
    tl.store(DW + (n * chunks + chunk) * taps + t, tl.sum(dw, 1), mask=t < taps)


@triton.jit
def weight(D, J, n, c, p, column, L):
    """weight [BC, BP]: a select, not a product, since d0 may be infinite."""
    d0 = tl.load(D + 2 * n * L + p, mask=column, other=0.0)
    every = tl.load(D + (2 * n + 1) * L + p, mask=column, other=0.0)
    j = tl.load(J + n * L + p, mask=column, other=-1)
    return tl.where(j[None, :] == c[:, None], (every + d0)[None, :], every[None, :])


@triton.jit(do_not_specialize=BATCH)
def weigh(
    X, MU, D, J, PQ, R, TILES, N, C, L, STEPS,
    S: tl.constexpr, ACC: tl.constexpr, NHWC: tl.constexpr, UNIT: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Pass 2: R0 and R1 as R (N, S, 2, C), in S parts of the pixels; the first adds the TILES parts of PQ."""
    C, L = extents(C, L, NHWC, UNIT)
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    n, part, c0 = tl.cast(N - 1 - pid // (blocks * S), tl.int64), pid // blocks % S, pid % blocks * BC
    lc, lp = tl.arange(0, BC), tl.arange(0, BP)
    c, row = c0 + lc, c0 + lc < C
    tile = tile_offsets(lc, lp, C, L, NHWC, WIDE)
    mu = tl.zeros((BC,), ACC)
    if MU is not None:
        mu = tl.load(MU + c, mask=row, other=0.0)
    first, second = tl.zeros((BC, BP), ACC), tl.zeros((BC, BP), ACC)
    begin, end = part * STEPS * BP, tl.minimum(L, (part + 1) * STEPS * BP)
    inside = row[:, None] & (begin + lp < end)[None, :]
    prefetched = load_tile(X + origin(n, c0, begin, C, L, NHWC) + tile, inside, EVEN)
    for start in range(begin, end, BP):
        x = prefetched.to(ACC)
        column = start + lp < end
        inside = row[:, None] & column[None, :]
        ahead = row[:, None] & (start + BP + lp < end)[None, :]
        prefetched = tl.load(X + origin(n, c0, start + BP, C, L, NHWC) + tile, mask=ahead, other=0.0)
        share = weight(D, J, n, c, start + lp, column, L)
        first += zero_outside(share, inside, EVEN)
        second += zero_outside(share * (x - mu[:, None]), inside, EVEN)
    r0, r1 = tl.sum(first, 1), tl.sum(second, 1)
    if part == 0:
        p_sum, q_sum = tl.zeros((BC, BT), ACC), tl.zeros((BC, BT), ACC)
        for start in range(0, TILES, BT):
            t = start + tl.arange(0, BT)
            offset = PQ + (n * TILES + t)[None, :] * 2 * C + c[:, None]
            inside_parts = row[:, None] & (t < TILES)[None, :]
            p_sum += tl.load(offset, mask=inside_parts, other=0.0)
            q_sum += tl.load(offset + C, mask=inside_parts, other=0.0)
        r0 += tl.sum(p_sum, 1)
        r1 += tl.sum(q_sum, 1)
    out = R + (n * S + part) * 2 * C + c
    tl.store(out, r0, mask=row)
    tl.store(out + C, r1, mask=row)


@triton.jit(do_not_specialize=BATCH)
def write(
    X, MU, GRAD, DX, S, S_GAMMA, S_BETA, S_MU, S_VAR, D, J, K, SCALE, LEVEL, PEAK, SLOPE, N, C, L, STEPS,
    S_EPS: tl.constexpr, GAIN: tl.constexpr, CS: tl.constexpr, ACC: tl.constexpr, NHWC: tl.constexpr,
    UNIT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Pass 3: dx = SCALE (g Ms + weight) + LEVEL + (PEAK at k) - SLOPE (x - mu); see `parameter_gradients`.

    Only batch statistics have the last term, and with it the read of x.
    """
    C, L = extents(C, L, NHWC, UNIT)
    tiles = tl.cdiv(L, BP)
    pid = tl.program_id(0)
    n, part, p0 = tl.cast(pid // (tiles * CS), tl.int64), pid // tiles % CS, pid % tiles * BP
    lc, lp = tl.arange(0, BC), tl.arange(0, BP)
    p, column = p0 + lp, p0 + lp < L
    tile = tile_offsets(lc, lp, C, L, NHWC, WIDE)
    if S is not None:
        s = tl.load(S + n * L + p, mask=column, other=0.0)
        logit = normalised_map(s, S_GAMMA, S_BETA, S_MU, S_VAR, S_EPS, ACC)[1]
        ms = sigmoid(logit, GAIN)
    for c0 in range(part * STEPS * BC, tl.minimum(C, (part + 1) * STEPS * BC), BC):
        c, row = c0 + lc, c0 + lc < C
        inside = row[:, None] & column[None, :]
        offset = origin(n, c0, p0, C, L, NHWC) + tile
        d = load_tile(GRAD + offset, inside, EVEN).to(ACC)
        if SLOPE is not None:
            x = load_tile(X + offset, inside, EVEN).to(ACC)
        if S is not None:
            d = d * ms[None, :] + weight(D, J, n, c, p, column, L)
        if SCALE is not None:
            d = d * tl.load(SCALE + n * C + c, mask=row, other=0.0)[:, None]
        if LEVEL is not None:
            d += tl.load(LEVEL + n * C + c, mask=row, other=0.0)[:, None]
        if PEAK is not None:
            k = tl.load(K + n * C + c, mask=row, other=-1)
            peak = tl.load(PEAK + n * C + c, mask=row, other=0.0)
            d = tl.where(k[:, None] == p[None, :], d + peak[:, None], d)
        if SLOPE is not None:
            mu = tl.load(MU + c, mask=row, other=0.0)
            slope = tl.load(SLOPE + c, mask=row, other=0.0)
            d -= slope[:, None] * (x - mu[:, None])
        if EVEN:
            tl.store(DX + offset, d.to(DX.dtype.element_ty))
        else:
            tl.store(DX + offset, d.to(DX.dtype.element_ty), mask=inside)
