"""What all Triton kernels share: a tile of the feature map, its loads, and the expressions on it.

N samples, C channels, L = H W pixels; M = N L. A tile is [BC channels, BP pixels] in both layouts: the
compiler puts the lanes along the contiguous axis. The extent of that axis is passed in multiples of UNIT, so
that the compiler knows how wide a load may be. ACC is the type of the computation. The pointer to an absent
tensor is None. Only `tl.fma` fuses products and sums, so that the same expression gives the same bits in
every kernel.
"""

# Triton's tensors, pointers and constants are not Python types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false, reportReturnType=false

import triton
import triton.language as tl

BATCH = ("N", "COUNT")  # not specialised on: a batch of another size compiles no new kernel


@triton.jit
def extents(C, L, NHWC: tl.constexpr, UNIT: tl.constexpr):
    """C and L; the one that is contiguous is given in multiples of UNIT."""
    if NHWC:
        return C * UNIT, L
    return C, L * UNIT


@triton.jit
def origin(n, c, p, C, L, NHWC: tl.constexpr):
    """The 64-bit offset of channel c, pixel p of sample n."""
    sample = tl.cast(n, tl.int64) * C * L
    if NHWC:
        return sample + tl.cast(p, tl.int64) * C + c
    return sample + tl.cast(c, tl.int64) * L + p


@triton.jit
def tile_offsets(c, p, C, L, NHWC: tl.constexpr, WIDE: tl.constexpr):
    """The offsets [BC, BP] of a tile from its origin."""
    if WIDE:
        c, p = c.to(tl.int64), p.to(tl.int64)
    if NHWC:
        return p[None, :] * C + c[:, None]
    return c[:, None] * L + p[None, :]


@triton.jit
def divide(a, b):
    """a / b, rounded once."""
    if a.dtype == tl.float64:
        return a / tl.cast(b, tl.float64)
    else:  # noqa: RET505  (code after a return is compiled too, and div_rn has no float64)
        return tl.div_rn(a, tl.cast(b, tl.float32))


@triton.jit
def inverse_std(v, EPS: tl.constexpr):
    """1 / sqrt(v + EPS), to about the last place."""
    v = v + EPS
    if v.dtype == tl.float64:
        return 1.0 / tl.sqrt(v)
    r = tl.rsqrt(v)
    return tl.where((v > 0) & (v < float("inf")), r * (1.5 - 0.5 * v * r * r), r)  # one Newton step


@triton.jit
def sigmoid(t, GAIN: tl.constexpr):
    """GAIN times the sigmoid of t, exactly 1 at t = 0 if GAIN is 2."""
    return tl.where(t == 0, 0.5 * GAIN, GAIN / (1.0 + tl.exp(-t))).to(t.dtype)


@triton.jit
def relu(t):
    """A select, so that NaN passes."""
    return tl.where(t <= 0, 0.0, t)


@triton.jit
def load_tile(pointer, inside, EVEN: tl.constexpr):
    """The values of a tile, 0 outside the map; EVEN: all of it is inside."""
    if EVEN:
        return tl.load(pointer)
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def zero_outside(value, inside, EVEN: tl.constexpr):
    """`value` inside the map, 0 outside."""
    if not EVEN:
        value = tl.where(inside, value, 0.0)
    return value


@triton.jit
def gated(x, mu, scale, shift, MU, SCALE):
    """z of a tile; never scale x + (shift - scale mu), which loses the digits of a large mean."""
    if MU is not None:
        return tl.fma(x - mu[:, None], tl.zeros(x.shape, x.dtype) + scale[:, None], shift[:, None])
    if SCALE is not None:
        return x * scale[:, None]
    return x


@triton.jit
def normalised_map(s, S_GAMMA, S_BETA, S_MU, S_VAR, EPS: tl.constexpr, ACC: tl.constexpr):
    """shat and the logit of Ms of convolution outputs s; the norm's terms are one element each."""
    zero = tl.zeros(s.shape, ACC)
    r = (1.0 / tl.sqrt(tl.load(S_VAR).to(tl.float64) + EPS)).to(ACC)
    shat = (s - tl.load(S_MU).to(ACC)) * r
    return shat, tl.fma(zero + tl.load(S_GAMMA).to(ACC), shat, zero + tl.load(S_BETA).to(ACC))
