"""Triton kernels of the channel gate, forward and backward, on tensors of the size (N, C).

    hidden, gate           m, e -> Mc = GAIN sigmoid(W2 (h(avg) + h(mx)) + POOLS b2)
    hidden_gradient        R0, R1 -> dl, da, dm             by samples
    parameter_gradients    -> dW1 ... dgamma, davg, dmx     by channels

h(t) = relu(W1 t + b1) has H hidden units; avg and mx are m and e after BatchNorm; POOLS of the two are in
use. A block is BN samples, BH hidden units, BC channels; sums of products avoid `tl.dot` to keep full
precision.
"""

# Triton's tensors, pointers and constants are not Python types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false, reportReturnType=false

import triton
import triton.language as tl

from cbam.ops.triton_tiles import BATCH, inverse_std, relu, sigmoid


@triton.jit
def norm_terms(GAMMA, BETA, MU, VAR, c, inside, EPS: tl.constexpr, ACC: tl.constexpr):
    """mu, r, a and beta [BC] of y = a (x - mu) + beta, a = gamma r; 0, 1, 1 and 0 without a norm."""
    mu, beta = tl.zeros(c.shape, ACC), tl.zeros(c.shape, ACC)
    r = tl.full(c.shape, 1.0, ACC)
    a = r
    if GAMMA is not None:
        mu = tl.load(MU + c, mask=inside, other=0.0).to(ACC)
        r = inverse_std(tl.load(VAR + c, mask=inside, other=0.0).to(ACC), EPS)
        a = tl.load(GAMMA + c, mask=inside, other=0.0).to(ACC) * r
        beta = tl.load(BETA + c, mask=inside, other=0.0).to(ACC)
    return mu, r, a, beta


@triton.jit
def normalised(x, mu, a, beta, GAMMA):
    """y of a block of pooled values [BN, BC]."""
    if GAMMA is None:
        return x
    return tl.fma(x - mu[None, :], tl.zeros(x.shape, x.dtype) + a[None, :], beta[None, :])


@triton.jit
def merged(
    MEAN, TOP, AT, GAMMA, n, c, inside, C, L, STEPS,
    S: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """m, e and k [BN, BC] of whole planes, from their S parts in order; e and k are 0 without TOP."""
    offset = (n.to(tl.int64) * S)[:, None] * C + c[None, :]
    mean = tl.load(MEAN + offset, mask=inside, other=0.0)
    top, at = tl.zeros(mean.shape, ACC), tl.zeros(mean.shape, tl.int32)
    if TOP is not None:
        top = tl.load(TOP + offset, mask=inside, other=0.0).to(ACC)
        at = tl.load(AT + offset, mask=inside, other=0)
    if S > 1:
        sign = tl.full(c.shape, 1.0, ACC)
        if GAMMA is not None:
            gamma = tl.load(GAMMA + c, mask=c < C, other=0.0).to(ACC)
            sign = tl.where(gamma > 0, 1.0, tl.where(gamma < 0, -1.0, 0.0)).to(ACC)
        mean = mean * (STEPS * BP)
        for part in range(1, S):
            count = tl.minimum(STEPS * BP, L - part * STEPS * BP)
            mean += tl.load(MEAN + offset + part * C, mask=inside, other=0.0) * count
            if TOP is not None:
                other = tl.load(TOP + offset + part * C, mask=inside, other=0.0).to(ACC)
                wins = (other * sign[None, :] > top * sign[None, :]) | (other != other)
                top = tl.where(wins, other, top)
                at = tl.where(wins, tl.load(AT + offset + part * C, mask=inside, other=0), at)
        mean = mean / L
    return mean, top, at


@triton.jit
def hidden_units(
    MEAN, TOP, AT, M, E, K, GAMMA, BETA, MU, VAR, W1, B1, n, h, N, C, L, H, STEPS,
    EPS: tl.constexpr, S: tl.constexpr, AVG: tl.constexpr, ACC: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """W1 avg + b1 and W1 mx + b1 [BN, BH] before the ReLU; stores the merged m, e, k if M is given."""
    rows, units = n < N, h < H
    bias = tl.load(B1 + h, mask=units, other=0.0).to(ACC)[None, :]
    of_avg = tl.zeros((n.shape[0], h.shape[0]), ACC) + bias
    of_top = of_avg
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        inside = rows[:, None] & (c < C)[None, :]
        m, e, k = merged(MEAN, TOP, AT, GAMMA, n, c, inside, C, L, STEPS, S, ACC, BP)
        if M is not None:
            offset = n.to(tl.int64)[:, None] * C + c[None, :]
            tl.store(M + offset, m, mask=inside)
            if E is not None:
                tl.store(E + offset, e.to(E.dtype.element_ty), mask=inside)
                tl.store(K + offset, k, mask=inside)
        mu, _r, a, beta = norm_terms(GAMMA, BETA, MU, VAR, c, c < C, EPS, ACC)
        w1 = tl.load(W1 + h[:, None] * C + c[None, :], mask=units[:, None] & (c < C)[None, :], other=0.0)
        w1 = w1.to(ACC)[None, :, :]
        if AVG:
            avg = tl.where(inside, normalised(m, mu, a, beta, GAMMA), 0.0)
            of_avg += tl.sum(w1 * avg[:, None, :], 2)
        if TOP is not None:
            top = tl.where(inside, normalised(e, mu, a, beta, GAMMA), 0.0)
            of_top += tl.sum(w1 * top[:, None, :], 2)
    return of_avg, of_top


@triton.jit
def activation(of_avg, of_top, AVG: tl.constexpr, MAX: tl.constexpr):
    """h(avg) + h(mx), of the pools in use."""
    if not MAX:
        return relu(of_avg)
    if not AVG:
        return relu(of_top)
    return relu(of_avg) + relu(of_top)


@triton.jit(do_not_specialize=BATCH)
def hidden(
    MEAN, TOP, AT, M, E, K, GAMMA, BETA, MU, VAR, W1, B1, ACT, N, C, L, H, STEPS,
    EPS: tl.constexpr, S: tl.constexpr, AVG: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """h(avg) + h(mx) (N, H) of wide gates, which have too many weights for one program."""
    blocks = tl.cdiv(H, BH)
    n = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    h = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    of_avg, of_top = hidden_units(
        MEAN, TOP, AT, M, E, K, GAMMA, BETA, MU, VAR, W1, B1, n, h, N, C, L, H, STEPS,
        EPS, S, AVG, ACC, BC, BP,
    )  # fmt: skip
    inside = (n < N)[:, None] & (h < H)[None, :]
    tl.store(ACT + n[:, None] * H + h[None, :], activation(of_avg, of_top, AVG, TOP is not None), mask=inside)


@triton.jit(do_not_specialize=BATCH)
def gate(
    MEAN, TOP, AT, M, E, K, GAMMA, BETA, MU, VAR, W1, B1, W2, B2, ACT, GATE, SCALE, SHIFT,
    N, C, L, H, STEPS,
    EPS: tl.constexpr, GAIN: tl.constexpr, POOLS: tl.constexpr, S: tl.constexpr, AVG: tl.constexpr,
    ACC: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Mc (N, C): a program takes BN samples, or BC of their channels if ACT is given.

    With a norm also SCALE = Mc a and SHIFT = Mc beta (N, C): z = SCALE (x - mu) + SHIFT.
    """
    if ACT is None:
        first, last = 0, C
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        of_avg, of_top = hidden_units(
            MEAN, TOP, AT, M, E, K, GAMMA, BETA, MU, VAR, W1, B1, n, tl.arange(0, BH), N, C, L, H, STEPS,
            EPS, S, AVG, ACC, BC, BP,
        )  # fmt: skip
        act = activation(of_avg, of_top, AVG, TOP is not None)
    else:
        blocks = tl.cdiv(C, BC)
        first = tl.program_id(0) % blocks * BC
        last = first + BC
        n = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    for c0 in range(first, last, BC):
        c = c0 + tl.arange(0, BC)
        logits = tl.zeros((BN, BC), ACC) + POOLS * tl.load(B2 + c, mask=c < C, other=0.0).to(ACC)[None, :]
        for h0 in range(0, H, BH):
            h = h0 + tl.arange(0, BH)
            if ACT is not None:
                act = tl.load(
                    ACT + n[:, None] * H + h[None, :], mask=(n < N)[:, None] & (h < H)[None, :], other=0.0
                )
            w2 = tl.load(
                W2 + c[:, None] * H + h[None, :], mask=(c < C)[:, None] & (h < H)[None, :], other=0.0
            )
            logits += tl.sum(w2.to(ACC)[None, :, :] * act[:, None, :], 2)
        offset = n.to(tl.int64)[:, None] * C + c[None, :]
        inside = (n < N)[:, None] & (c < C)[None, :]
        mc = sigmoid(logits, GAIN)
        tl.store(GATE + offset, mc, mask=inside)
        if GAMMA is not None:
            _mu, _r, a, beta = norm_terms(GAMMA, BETA, MU, VAR, c, c < C, EPS, ACC)
            tl.store(SCALE + offset, mc * a[None, :], mask=inside)
            tl.store(SHIFT + offset, mc * beta[None, :], mask=inside)


@triton.jit
def reductions(R, n, c, inside, C, RS):
    """R0 and R1 [BN, BC] from their RS parts in order."""
    offset = (n.to(tl.int64) * RS)[:, None] * 2 * C + c[None, :]
    r0 = tl.load(R + offset, mask=inside, other=0.0)
    r1 = tl.load(R + offset + C, mask=inside, other=0.0)
    for part in range(1, RS):
        r0 += tl.load(R + offset + 2 * part * C, mask=inside, other=0.0)
        r1 += tl.load(R + offset + (2 * part + 1) * C, mask=inside, other=0.0)
    return r0, r1


@triton.jit(do_not_specialize=BATCH)
def hidden_gradient(
    R, M, E, GATE, GAMMA, BETA, MU, VAR, W1, B1, W2, DL, ACT, DA, DM, N, C, L, H, RS,
    EPS: tl.constexpr, GAIN: tl.constexpr, AVG: tl.constexpr, MAX: tl.constexpr,
    ACC: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dl (N, C), the gradient of the gate's logits; h(avg) + h(mx), da and dm (N, H), by samples."""
    blocks = tl.cdiv(H, BH)
    n = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    h = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    rows, units = n < N, h < H
    bias = tl.load(B1 + h, mask=units, other=0.0).to(ACC)[None, :]
    of_avg = tl.zeros((BN, BH), ACC) + bias
    of_top, dh = of_avg, tl.zeros((BN, BH), ACC)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        inside = rows[:, None] & (c < C)[None, :]
        offset = n.to(tl.int64)[:, None] * C + c[None, :]
        mu, _r, a, beta = norm_terms(GAMMA, BETA, MU, VAR, c, c < C, EPS, ACC)
        r0, r1 = reductions(R, n, c, inside, C, RS)
        mc = tl.load(GATE + offset, mask=inside, other=0.0)
        dl = tl.where(inside, (a[None, :] * r1 + beta[None, :] * r0) * (mc * (1.0 - mc / GAIN)), 0.0)
        if tl.program_id(0) % blocks == 0:
            tl.store(DL + offset, dl, mask=inside)
        square = units[:, None] & (c < C)[None, :]
        w2 = tl.load(W2 + c[None, :] * H + h[:, None], mask=square, other=0.0).to(ACC)
        dh += tl.sum(w2[None, :, :] * dl[:, None, :], 2)
        w1 = tl.load(W1 + h[:, None] * C + c[None, :], mask=square, other=0.0).to(ACC)
        if AVG:
            m = tl.load(M + offset, mask=inside, other=0.0)
            avg = tl.where(inside, normalised(m, mu, a, beta, GAMMA), 0.0)
            of_avg += tl.sum(w1[None, :, :] * avg[:, None, :], 2)
        if MAX:
            e = tl.load(E + offset, mask=inside, other=0.0).to(ACC)
            top = tl.where(inside, normalised(e, mu, a, beta, GAMMA), 0.0)
            of_top += tl.sum(w1[None, :, :] * top[:, None, :], 2)
    out = n[:, None] * H + h[None, :]
    inside = rows[:, None] & units[None, :]
    tl.store(ACT + out, activation(of_avg, of_top, AVG, MAX), mask=inside)
    if AVG:
        tl.store(DA + out, tl.where(of_avg <= 0, 0.0, dh), mask=inside)
    if MAX:
        tl.store(DM + out, tl.where(of_top <= 0, 0.0, dh), mask=inside)


@triton.jit
def through_hidden(
    DH, W1, n, c, N, C, H, BN: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr
):
    """dh W1 [BN, BC]: the gradient of a pooled value.

    The sum is over the last axis: over the middle one Triton 3.6 turns it into a matrix product, in TF32.
    """
    total = tl.zeros((BN, BC), ACC)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        dh = tl.load(DH + n[:, None] * H + h[None, :], mask=(n < N)[:, None] & (h < H)[None, :], other=0.0)
        w1 = tl.load(W1 + h[None, :] * C + c[:, None], mask=(h < H)[None, :] & (c < C)[:, None], other=0.0)
        total += tl.sum(dh[:, None, :] * w1.to(ACC)[None, :, :], 2)
    return total


@triton.jit
def kernel_gradient(DW, DKERNEL, t, TAPS, COUNT, BR: tl.constexpr, BT: tl.constexpr):
    """dw of BT taps from its COUNT parts, summed in float64 in a fixed order."""
    total = tl.zeros((BR, BT), tl.float64)
    for start in range(0, COUNT, BR):
        r = start + tl.arange(0, BR)
        inside = (r < COUNT)[:, None] & (t < TAPS)[None, :]
        total += tl.load(DW + r[:, None] * TAPS + t[None, :], mask=inside, other=0.0).to(tl.float64)
    tl.store(DKERNEL + t, tl.sum(total, 0).to(DKERNEL.dtype.element_ty), mask=t < TAPS)


@triton.jit
def subtract_from_level(LEVEL, by, c, row, samples, N, C, BN: tl.constexpr):
    """Subtract `by` [BC] from LEVEL of every sample."""
    for start in range(0, samples, BN):
        n = start + tl.arange(0, BN)
        inside = (n < N)[:, None] & row[None, :]
        offset = n.to(tl.int64)[:, None] * C + c[None, :]
        tl.store(LEVEL + offset, tl.load(LEVEL + offset, mask=inside, other=0.0) - by[None, :], mask=inside)


@triton.jit(do_not_specialize=BATCH)
def parameter_gradients(
    R, M, E, GATE, GAMMA, BETA, MU, VAR, W1, DL, ACT, DA, DM, DW,
    SCALE, LEVEL, PEAK, SLOPE, DW1, DB1, DW2, DB2, DGAMMA, DBETA, DKERNEL, N, C, L, H, RS, TAPS, COUNT,
    EPS: tl.constexpr, BATCH: tl.constexpr, POOLS: tl.constexpr, AVG: tl.constexpr, MAX: tl.constexpr,
    ACC: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """All parameters' gradients except the spatial norm's, by BC channels and BH units; and pass 3's terms.

    dx = SCALE (g Ms + weight) + LEVEL + (PEAK at k) - SLOPE (x - mu): SCALE = a Mc, PEAK = a dmx,
    LEVEL = a (davg / L - dbeta / M), (N, C); SLOPE = a r dgamma / M, (C,); only BATCH statistics have the two
    terms with M. The first block of units computes all that has no unit. The first programs, which have no
    block, sum the spatial kernel's gradient.
    """
    pid = tl.program_id(0)
    if DW is not None:
        sums = tl.cdiv(TAPS, BT)
        if pid < sums:
            kernel_gradient(DW, DKERNEL, pid * BT + tl.arange(0, BT), TAPS, COUNT, BR, BT)
        pid -= sums
    channels, samples = tl.where(pid >= 0, C, 0), tl.where(pid >= 0, N, 0)
    pid = tl.maximum(pid, 0)
    units = tl.cdiv(H, BH)
    c = pid // units * BC + tl.arange(0, BC)
    h = pid % units * BH + tl.arange(0, BH)
    lead = pid % units == 0
    row = c < channels
    mu, r, a, beta = norm_terms(GAMMA, BETA, MU, VAR, c, row, EPS, ACC)
    dgamma, dbeta = tl.zeros((BN, BC), ACC), tl.zeros((BN, BC), ACC)
    if W1 is not None:
        dw1, dw2 = tl.zeros((BC, BH), ACC), tl.zeros((BC, BH), ACC)
        db1, db2 = tl.zeros((BN, BH), ACC), tl.zeros((BN, BC), ACC)
    for start in range(0, samples, BN):
        n = start + tl.arange(0, BN)
        inside = (n < N)[:, None] & row[None, :]
        offset = n.to(tl.int64)[:, None] * C + c[None, :]
        if W1 is not None:
            wide = (n < N)[:, None] & (h < H)[None, :]
            of_units = n[:, None] * H + h[None, :]
            dl = tl.load(DL + offset, mask=inside, other=0.0)
            act = tl.load(ACT + of_units, mask=wide, other=0.0)
            db2 += dl
            dw2 += tl.sum(dl[:, :, None] * act[:, None, :], 0)
            if AVG:
                m = tl.load(M + offset, mask=inside, other=0.0)
                da = tl.load(DA + of_units, mask=wide, other=0.0)
                avg = tl.where(inside, normalised(m, mu, a, beta, GAMMA), 0.0)
                dw1 += tl.sum(avg[:, :, None] * da[:, None, :], 0)
                db1 += da
            if MAX:
                e = tl.load(E + offset, mask=inside, other=0.0).to(ACC)
                dm = tl.load(DM + of_units, mask=wide, other=0.0)
                top = tl.where(inside, normalised(e, mu, a, beta, GAMMA), 0.0)
                dw1 += tl.sum(top[:, :, None] * dm[:, None, :], 0)
                db1 += dm
        if lead:
            mc = tl.full((BN, BC), 1.0, ACC)
            if GATE is not None:
                mc = tl.load(GATE + offset, mask=inside, other=0.0)
            if GAMMA is not None:
                r0, r1 = reductions(R, n, c, inside, C, RS)
                dbeta += mc * r0
                dgamma += mc * r1
            level = tl.zeros((BN, BC), ACC)
            if W1 is not None and AVG:
                davg = through_hidden(DA, W1, n, c, N, C, H, BN, BH, BC, ACC)
                level = a[None, :] * davg / L
                if GAMMA is not None:
                    dbeta += tl.where(inside, davg, 0.0)
                    dgamma += tl.where(inside, davg * (m - mu[None, :]), 0.0)
            if W1 is not None and MAX:
                dtop = through_hidden(DM, W1, n, c, N, C, H, BN, BH, BC, ACC)
                if PEAK is not None:
                    tl.store(PEAK + offset, a[None, :] * dtop, mask=inside)
                if GAMMA is not None:
                    dbeta += tl.where(inside, dtop, 0.0)
                    dgamma += tl.where(inside, dtop * (e - mu[None, :]), 0.0)
            if SCALE is not None:
                tl.store(SCALE + offset, a[None, :] * mc, mask=inside)
            if LEVEL is not None:
                tl.store(LEVEL + offset, level, mask=inside)
    if W1 is not None:
        square = row[:, None] & (h < H)[None, :]
        tl.store(DW1 + h[None, :] * C + c[:, None], dw1, mask=square)
        tl.store(DW2 + c[:, None] * H + h[None, :], dw2, mask=square)
        if pid < tl.where(channels > 0, units, 0):
            tl.store(DB1 + h, tl.sum(db1, 0), mask=h < H)
        if lead:
            tl.store(DB2 + c, POOLS * tl.sum(db2, 0), mask=row)
    if GAMMA is not None:  # noqa: SIM102  (one is known at compile time, the other is not)
        if lead:
            of_beta, of_gamma = tl.sum(dbeta, 0), r * tl.sum(dgamma, 0)
            tl.store(DBETA + c, of_beta, mask=row)
            tl.store(DGAMMA + c, of_gamma, mask=row)
            if BATCH and LEVEL is not None:
                count = tl.cast(N, ACC) * L
                tl.store(SLOPE + c, a * r * of_gamma / count, mask=row)
                tl.debug_barrier()  # LEVEL was stored by other threads of this program
                subtract_from_level(LEVEL, a * of_beta / count, c, row, samples, N, C, BN)
