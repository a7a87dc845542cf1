"""Triton kernels of the forward: three passes over the feature map, and the small steps between them.

    pool      A     x -> m, M2, e, k            every channel of every sample
    statistics      m, M2 -> mu, v              BatchNorm's, over the batch
    (the gate)      m, e -> Mc                  in triton_gate.py
    squeeze   B     x -> q = [max_c z; mean_c z], z = Mc y, y = a (x - mu) + beta
    convolve        q -> s, s_mu, s_v           the spatial convolution and its statistics over the batch
    refine    C     x, shortcut -> out = relu(z Ms + shortcut)

Names and layouts are those of triton_tiles.py. Passes go through the samples in alternating order, so that a
pass finds in L2 what the previous one read last.
"""

# Triton's tensors, pointers and constants are not Python types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false, reportReturnType=false

import triton
import triton.language as tl

from cbam.ops.triton_tiles import (
    BATCH,
    divide,
    extents,
    gated,
    inverse_std,
    load_tile,
    normalised_map,
    origin,
    relu,
    sigmoid,
    tile_offsets,
    zero_outside,
)  # fmt: skip


@triton.jit
def terms(MU, SCALE, SHIFT, n, c, inside, C, GATED: tl.constexpr, ACC: tl.constexpr):
    """mu, scale and shift [BC] of z = scale (x - mu) + shift; the last two are (N, C) if GATED, else (C,)."""
    mu = tl.zeros(c.shape, ACC)
    scale = tl.full(c.shape, 1.0, ACC)
    shift = tl.zeros(c.shape, ACC)
    offset = c
    if GATED:
        offset = tl.cast(n, tl.int64) * C + c
    if MU is not None:
        mu = tl.load(MU + c, mask=inside, other=0.0).to(ACC)
        shift = tl.load(SHIFT + offset, mask=inside, other=0.0).to(ACC)
    if SCALE is not None:
        scale = tl.load(SCALE + offset, mask=inside, other=0.0)
    return mu, scale, shift


@triton.jit(do_not_specialize=BATCH)
def pool(
    X, GAMMA, MEAN, M2, TOP, AT, N, C, L, STEPS,
    S: tl.constexpr, NANS: tl.constexpr, ACC: tl.constexpr, NHWC: tl.constexpr, UNIT: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Pass A: (N, S, C) mean, centred second moment, extremum and its first pixel, of S parts of each plane.

    The extremum of x is where y is largest: the maximum, the minimum if gamma is negative, the first pixel if
    gamma is zero. It may ignore NaN, since the mean carries NaN to the gate. NANS: the gate does not use the
    mean, so the extremum itself becomes NaN. A part is STEPS tiles long.
    """
    C, L = extents(C, L, NHWC, UNIT)
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    n, part, c0 = pid // (blocks * S), pid // blocks % S, pid % blocks * BC
    begin = part * STEPS * BP
    end = tl.minimum(L, begin + STEPS * BP)
    lc, lp = tl.arange(0, BC), tl.arange(0, BP)
    c, row = c0 + lc, c0 + lc < C
    tile = tile_offsets(lc, lp, C, L, NHWC, WIDE)
    if TOP is not None and GAMMA is not None:
        gamma = tl.load(GAMMA + c, mask=row, other=0.0).to(ACC)
        sign = tl.where(gamma > 0, 1.0, tl.where(gamma < 0, -1.0, gamma)).to(ACC)
    mean = tl.zeros((BC, BP), ACC)
    if M2 is not None:
        # Differences are taken from this pixel, which is near the mean even if that is far from zero.
        pivot = tl.load(
            X + origin(n, c0, begin, C, L, NHWC) + tile_offsets(lc, tl.arange(0, 1), C, L, NHWC, WIDE),
            mask=row[:, None],
            other=0.0,
        ).to(ACC)
        pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
        moment = tl.zeros((BC, BP), ACC)
        seen = tl.zeros((1, 1), ACC)
    if TOP is not None:
        best = tl.full((BC, BP), float("-inf"), ACC)
        tiles = tl.zeros((BC, BP), tl.int32) + begin
        if NANS:
            bad = tl.zeros((BC, BP), tl.int32)
    inside = row[:, None] & (begin + lp < end)[None, :]
    prefetched = load_tile(X + origin(n, c0, begin, C, L, NHWC) + tile, inside, EVEN)
    for start in range(begin, end, BP):
        x = prefetched.to(ACC)
        inside = row[:, None] & (start + lp < end)[None, :]
        ahead = row[:, None] & (start + BP + lp < end)[None, :]
        prefetched = tl.load(X + origin(n, c0, start + BP, C, L, NHWC) + tile, mask=ahead, other=0.0)
        if M2 is None:
            mean += x
        else:
            seen += 1.0
            shifted = x - pivot
            step = zero_outside(shifted - mean, inside, EVEN)
            mean = tl.fma(step, tl.zeros((BC, BP), ACC) + 1.0 / seen, mean)
            moment = tl.fma(step, zero_outside(shifted - mean, inside, EVEN), moment)
        if TOP is not None:
            if GAMMA is not None:
                x = x * sign[:, None]
            better = x > best
            if not EVEN:
                better = inside & better
            best = tl.where(better, x, best)
            tiles = tl.where(better, start, tiles)
            if NANS:
                bad |= zero_outside(x != x, inside, EVEN).to(tl.int32)
    out = (tl.cast(n, tl.int64) * S + part) * C + c
    count = end - begin
    if M2 is None:
        tl.store(MEAN + out, divide(tl.sum(mean, 1), count), mask=row)
    else:
        # Each lane has its own mean; they are merged about the mean of all, in two steps.
        counts = ((count - lp + BP - 1) // BP).to(ACC)[None, :]
        middle = divide(tl.sum(counts * mean, 1), count)
        deviation = mean - middle[:, None]
        tl.store(M2 + out, tl.sum(tl.fma(counts * deviation, deviation, moment), 1), mask=row)
        tl.store(MEAN + out, tl.sum(pivot, 1) + middle, mask=row)
    if TOP is not None:
        top = tl.max(best, 1)
        first = tl.min(tl.where(best == top[:, None], tiles + lp[None, :], 2147483647), 1)
        if NHWC:
            offset = first.to(tl.int64) * C + lc
        else:
            offset = lc.to(tl.int64) * L + first
        value = tl.load(X + origin(n, c0, 0, C, L, NHWC) + offset, mask=row, other=0.0).to(ACC)
        if NANS:
            value = tl.where(tl.max(bad, 1) > 0, float("nan"), value)
        tl.store(TOP + out, value.to(TOP.dtype.element_ty), mask=row)
        tl.store(AT + out, first, mask=row)


@triton.jit(do_not_specialize=BATCH)
def statistics(
    MEAN, M2, MU, VAR, GAMMA, SCALE, N, C, L, STEPS,
    EPS: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """mu and the biased v (C,) over the batch, merged in float64 about the first plane's mean.

    If there is a SCALE (C,), it receives a = gamma / sqrt(v + EPS).
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    column = c < C
    first = tl.load(MEAN + c, mask=column, other=0.0).to(tl.float64)
    within_planes = tl.zeros((BR, BC), tl.float64)
    weighted = tl.zeros((BR, BC), tl.float64)
    squared = tl.zeros((BR, BC), tl.float64)
    for start in range(0, N * S, BR):
        r = start + tl.arange(0, BR)
        inside = (r < N * S)[:, None] & column[None, :]
        offset = r.to(tl.int64)[:, None] * C + c[None, :]
        count = tl.minimum(STEPS * BP, L - r % S * STEPS * BP).to(tl.float64)[:, None]
        deviation = tl.load(MEAN + offset, mask=inside, other=0.0).to(tl.float64) - first[None, :]
        deviation = tl.where(inside, deviation, 0.0)
        within_planes += tl.load(M2 + offset, mask=inside, other=0.0).to(tl.float64)
        weighted += count * deviation
        squared += count * deviation * deviation
    M = tl.cast(N, tl.float64) * L
    shift = tl.sum(weighted, 0) / M
    between = tl.sum(squared, 0) / M - shift * shift
    between = tl.where(between < 0, 0.0, between)
    tl.store(MU + c, (first + shift).to(ACC), mask=column)
    v = (tl.sum(within_planes, 0) / M + between).to(ACC)
    tl.store(VAR + c, v, mask=column)
    if SCALE is not None:
        gamma = tl.load(GAMMA + c, mask=column, other=0.0).to(ACC)
        tl.store(SCALE + c, gamma * inverse_std(v, EPS), mask=column)


@triton.jit
def update_running(MEAN, VAR, MU, V, c, inside, COUNT, HIGH, LOW):
    """Update running statistics by the batch's with momentum HIGH + LOW, in float64; V is biased."""
    momentum = tl.cast(HIGH, tl.float64) + tl.cast(LOW, tl.float64)
    count = tl.cast(COUNT, tl.float64)
    mean = tl.load(MEAN + c, mask=inside, other=0.0).to(tl.float64)
    mean += momentum * (tl.load(MU + c, mask=inside, other=0.0).to(tl.float64) - mean)
    var = tl.load(VAR + c, mask=inside, other=0.0).to(tl.float64)
    unbiased = tl.load(V + c, mask=inside, other=0.0).to(tl.float64) * (count / (count - 1.0))
    var += momentum * (unbiased - var)
    if MEAN.dtype.element_ty != tl.float64:
        mean, var = mean.to(tl.float32), var.to(tl.float32)  # float64 does not convert to every type
    tl.store(MEAN + c, mean.to(MEAN.dtype.element_ty), mask=inside)
    tl.store(VAR + c, var.to(VAR.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=BATCH)
def track(
    MEAN, VAR, MU, V, S_MEAN, S_VAR, S_MU, S_V, C, COUNT, HIGH, LOW, S_HIGH, S_LOW, BC: tl.constexpr
):  # fmt: skip
    """Update the running statistics of a norm (C,), and of the convolution's (1,) if it is given."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    update_running(MEAN, VAR, MU, V, c, c < C, COUNT, HIGH, LOW)
    if S_MEAN is not None:
        update_running(S_MEAN, S_VAR, S_MU, S_V, c, c < 1, COUNT, S_HIGH, S_LOW)


@triton.jit
def affine(GAMMA, VAR, SCALE, C, EPS: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr):
    """SCALE (C,) = gamma / sqrt(var + EPS) of running statistics, if no gate computes it."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    r = inverse_std(tl.load(VAR + c, mask=c < C, other=0.0).to(ACC), EPS)
    tl.store(SCALE + c, tl.load(GAMMA + c, mask=c < C, other=0.0).to(ACC) * r, mask=c < C)


@triton.jit(do_not_specialize=BATCH)
def squeeze(
    X, MU, SCALE, SHIFT, Q, TICKET, N, C, L, STEPS,
    GATED: tl.constexpr, CS: tl.constexpr, ACC: tl.constexpr, NHWC: tl.constexpr, UNIT: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Pass B: q (N, CS, 2, L), the maximum of z and its sum / C over each of CS parts of the channels.

    The maximum may ignore NaN: the sum does not, and the convolution reads both at the same pixels.
    """
    C, L = extents(C, L, NHWC, UNIT)
    tiles = tl.cdiv(L, BP)
    pid = tl.program_id(0)
    if TICKET is not None:  # reset for `convolve`, the next kernel
        tl.store(TICKET, 0, mask=pid == 0)
    n, part, p0 = N - 1 - pid // (tiles * CS), pid // tiles % CS, pid % tiles * BP
    lc, lp = tl.arange(0, BC), tl.arange(0, BP)
    column = p0 + lp < L
    tile = tile_offsets(lc, lp, C, L, NHWC, WIDE)
    best = tl.full((BC, BP), float("-inf"), ACC)
    total = tl.zeros((BC, BP), ACC)
    for c0 in range(part * STEPS * BC, tl.minimum(C, (part + 1) * STEPS * BC), BC):
        c, row = c0 + lc, c0 + lc < C
        inside = row[:, None] & column[None, :]
        x = load_tile(X + origin(n, c0, p0, C, L, NHWC) + tile, inside, EVEN).to(ACC)
        mu, scale, shift = terms(MU, SCALE, SHIFT, n, c, row, C, GATED, ACC)
        z = gated(x, mu, scale, shift, MU, SCALE)
        total += zero_outside(z, inside, EVEN)
        better = z > best
        if not EVEN:
            better = inside & better
        best = tl.where(better, z, best)
    out = Q + (tl.cast(n, tl.int64) * CS + part) * 2 * L + p0 + lp
    tl.store(out, tl.max(best, 0), mask=column)
    tl.store(out + L, divide(tl.sum(total, 0), C), mask=column)


@triton.jit
def pooled(Q, n, at, ok, L, CS: tl.constexpr):
    """q0 and q1 of sample n at pixels `at`, from the CS parts of the channels in order; 0 if not `ok`."""
    base = Q + tl.cast(n, tl.int64) * (CS * 2) * L + at
    q0 = tl.load(base, mask=ok, other=0.0)
    q1 = tl.load(base + L, mask=ok, other=0.0)
    for part in tl.static_range(1, CS):
        other = tl.load(base + 2 * part * L, mask=ok, other=0.0)
        q0 = tl.where(other > q0, other, q0)
        q1 += tl.load(base + (2 * part + 1) * L, mask=ok, other=0.0)
    return q0, q1


@triton.jit
def convolved(Q, KERNEL, n, p, L, W, KS: tl.constexpr, CS: tl.constexpr, ACC: tl.constexpr):
    """s at pixels p of sample n: the convolution of q with zero padding, in a fixed order of the taps."""
    y, x = p // W, p % W
    s = tl.zeros(p.shape, ACC)
    for row in range(KS):
        for column in tl.static_range(KS):
            yy, xx = y + row - KS // 2, x + column - KS // 2
            at = yy * W + xx
            ok = (yy >= 0) & (at < L) & (xx >= 0) & (xx < W) & (p < L)
            q0, q1 = pooled(Q, n, at, ok, L, CS)
            tap = KERNEL + row * KS + column
            s = tl.fma(q0, tl.zeros(p.shape, ACC) + tl.load(tap).to(ACC), s)
            s = tl.fma(q1, tl.zeros(p.shape, ACC) + tl.load(tap + KS * KS).to(ACC), s)
    return s


@triton.jit(do_not_specialize=BATCH)
def convolve(
    Q, KERNEL, SUMS, TICKET, S, S_MU, S_VAR, N, L, W,
    KS: tl.constexpr, CS: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """s (N, L) and, if SUMS is given, its mean and biased variance over the batch in float64.

    Each program writes the sum and the centred second moment of its pixels to SUMS (programs, 2). Whichever
    program draws the last ticket merges them in the order of the pixels.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(L, BP)
    n, p = pid // tiles, pid % tiles * BP + tl.arange(0, BP)
    s = convolved(Q, KERNEL, n, p, L, W, KS, CS, ACC)
    tl.store(S + tl.cast(n, tl.int64) * L + p, s, mask=p < L)
    if SUMS is not None:
        wide = tl.where(p < L, s.to(tl.float64), 0.0)
        total = tl.sum(wide, 0)
        count = tl.minimum(BP, L - pid % tiles * BP).to(tl.float64)
        deviation = tl.where(p < L, wide - total / count, 0.0)
        tl.store(SUMS + 2 * pid, total)
        tl.store(SUMS + 2 * pid + 1, tl.sum(deviation * deviation, 0))
        tl.debug_barrier()
        if tl.atomic_add(TICKET, 1, sem="acq_rel", scope="gpu") == N * tiles - 1:
            M = tl.cast(N, tl.float64) * L
            totals = tl.zeros((BR,), tl.float64)
            for start in range(0, N * tiles, BR):
                r = start + tl.arange(0, BR)
                totals += tl.load(SUMS + 2 * r, mask=r < N * tiles, other=0.0, cache_modifier=".cg")
            mean = tl.sum(totals, 0) / M
            squares = tl.zeros((BR,), tl.float64)
            for start in range(0, N * tiles, BR):
                r = start + tl.arange(0, BR)
                inside = r < N * tiles
                counts = tl.minimum(BP, L - r % tiles * BP).to(tl.float64)
                delta = tl.load(SUMS + 2 * r, mask=inside, other=0.0, cache_modifier=".cg") / counts - mean
                within_part = tl.load(SUMS + 2 * r + 1, mask=inside, other=0.0, cache_modifier=".cg")
                squares += tl.where(inside, within_part + counts * delta * delta, 0.0)
            tl.store(S_MU, mean)
            tl.store(S_VAR, tl.sum(squares, 0) / M)


@triton.jit(do_not_specialize=BATCH)
def refine(
    X, SHORTCUT, ADD_GAMMA, ADD_BETA, ADD_MU, ADD_VAR, MU, SCALE, SHIFT, Q, KERNEL, S, S_GAMMA, S_BETA,
    S_MU, S_VAR, OUT, W, N, C, L, STEPS,
    GATED: tl.constexpr, ADD_EPS: tl.constexpr, S_EPS: tl.constexpr, GAIN: tl.constexpr, RELU: tl.constexpr,
    KS: tl.constexpr, QS: tl.constexpr, CS: tl.constexpr, ACC: tl.constexpr, NHWC: tl.constexpr,
    UNIT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Pass C: out. If Q is given, the convolution is done here, and s is written if S is given too.

    ADD_GAMMA and the next three (C,), if given, are a norm to apply to the shortcut first.
    """
    C, L = extents(C, L, NHWC, UNIT)
    tiles = tl.cdiv(L, BP)
    pid = tl.program_id(0)
    n, part, p0 = pid // (tiles * CS), pid // tiles % CS, pid % tiles * BP
    lc, lp = tl.arange(0, BC), tl.arange(0, BP)
    p, column = p0 + lp, p0 + lp < L
    tile = tile_offsets(lc, lp, C, L, NHWC, WIDE)
    if S_MU is not None:
        if Q is not None:
            s = convolved(Q, KERNEL, n, p, L, W, KS, QS, ACC)
            if S is not None:  # noqa: SIM102  (one is known at compile time, the other is not)
                if part == 0:
                    tl.store(S + tl.cast(n, tl.int64) * L + p, s, mask=column)
        else:
            s = tl.load(S + tl.cast(n, tl.int64) * L + p, mask=column, other=0.0)
        _, logit = normalised_map(s, S_GAMMA, S_BETA, S_MU, S_VAR, S_EPS, ACC)
        ms = sigmoid(logit, GAIN)[None, :]
    for c0 in range(part * STEPS * BC, tl.minimum(C, (part + 1) * STEPS * BC), BC):
        c, row = c0 + lc, c0 + lc < C
        inside = row[:, None] & column[None, :]
        offset = origin(n, c0, p0, C, L, NHWC) + tile
        x = load_tile(X + offset, inside, EVEN)
        if SHORTCUT is not None:
            shortcut = load_tile(SHORTCUT + offset, inside, EVEN)
        mu, scale, shift = terms(MU, SCALE, SHIFT, n, c, row, C, GATED, ACC)
        v = gated(x.to(ACC), mu, scale, shift, MU, SCALE)
        if S_MU is not None:
            v = v * ms
        if SHORTCUT is not None:
            added = shortcut.to(ACC)
            if ADD_GAMMA is not None:
                a = tl.load(ADD_GAMMA + c, mask=row, other=0.0).to(ACC)
                a = a * inverse_std(tl.load(ADD_VAR + c, mask=row, other=1.0).to(ACC), ADD_EPS)
                mean = tl.load(ADD_MU + c, mask=row, other=0.0).to(ACC)
                beta = tl.load(ADD_BETA + c, mask=row, other=0.0).to(ACC)
                added = gated(added, mean, a, beta, ADD_MU, None)
            v += added
        if RELU:
            v = relu(v)
        if EVEN:
            tl.store(OUT + offset, v.to(OUT.dtype.element_ty))
        else:
            tl.store(OUT + offset, v.to(OUT.dtype.element_ty), mask=inside)
