"""Which tiles the Triton kernels work in: a table by shape, layout, type and number of multiprocessors.

Nothing here looks at data, time or load, so that the order of every sum, and with it every bit of a result, is
the same in each run on one kind of device.
"""

from dataclasses import dataclass
from functools import lru_cache

INTERPRETED = 4  # multiprocessors that a device without any counts as


@dataclass(frozen=True)
class Tile:
    """[channels, pixels] of a tile, the warps that hold it, and the division of the axis a program walks.

    The axis is cut into `parts`, one program each, of `steps` tiles; none is empty.
    """

    channels: int
    pixels: int
    warps: int
    parts: int
    steps: int
    programs: int


@dataclass(frozen=True)
class Plan:
    """The tiles of a feature map's passes, and the blocks of the steps between them."""

    nhwc: bool
    unit: int  # of the contiguous extent: what both it and a 16-byte access are a multiple of
    pool: Tile  # A and 2 walk the pixels
    weigh: Tile
    squeeze: Tile  # B, C, 1 and 3 walk the channels
    refine: Tile
    gradient: Tile
    write: Tile
    fold: bool  # in eval mode the convolution is done inside pass C
    conv: int  # pixels of a program of the convolution
    spread: (
        Tile  # the spatial gradient: [taps, pixels] at a time, chunks of a sample, tiles of `conv` in each
    )


@dataclass(frozen=True)
class Gate:
    """The blocks of the channel gate: samples, hidden units, channels; `alone`: one kernel does both layers."""

    samples: int
    hidden: int
    channels: int
    alone: bool


# Elements of a tile and lanes along the contiguous axis, (NCHW, NHWC), for two bytes or four a value; a
# program of pass 1 keeps four accumulators per element, those of A and 2 two to four, of B two.
TILES = {
    "pool": (4096, 1024, 128),
    "weigh": (4096, 1024, 128),
    "squeeze": (4096, 256, 128),
    "refine": (4096, 512, 256),
    "gradient": (2048, 256, 64),
    "write": (4096, 512, 256),
}
ELEMENTS_PER_THREAD = 16
WAVES = 4  # programs per multiprocessor that a pass is cut into where the shape allows


@lru_cache(4096)
def plan(N: int, C: int, L: int, nhwc: bool, itemsize: int, processors: int) -> Plan:
    """The plan of a map (N, C, L) of `itemsize` bytes a value on a device of `processors` multiprocessors."""

    def tile(name: str) -> Tile:
        elements, lanes = TILES[name][0], TILES[name][1 + nhwc]
        if processors == INTERPRETED:
            elements, lanes = 128, 16
        elif itemsize == 8:
            elements //= 2
        walks_pixels = name in ("pool", "weigh")
        BC, BP = shape(
            C, L, nhwc, elements, lanes, few=N * blocks(C if walks_pixels else L, lanes) < processors
        )
        if walks_pixels:
            programs, tiles, most = N * blocks(C, BC), blocks(L, BP), 16
        else:
            programs, tiles, most = N * blocks(L, BP), blocks(C, BC), 8
        if name == "gradient":
            most = 1  # a program must see every channel of its pixels
        parts = max(1, min(tiles, most, blocks(WAVES * processors, programs)))
        steps = blocks(tiles, parts)
        warps = min(8, max(1, power(BC * BP) // (32 * ELEMENTS_PER_THREAD)))
        parts = blocks(tiles, steps)
        return Tile(BC, BP, warps, parts, steps, programs * parts)

    tiles = {name: tile(name) for name in TILES}
    small = N * C * L * itemsize <= 1 << 23
    conv = min(power(L), 16 if processors == INTERPRETED else 256)
    chunks = max(min(blocks(L, conv), blocks(2 * processors, N)), blocks(L, 1024))
    steps = blocks(blocks(L, conv), chunks)
    taps, pixels = (32, 8) if processors == INTERPRETED else (128, 32)
    chunks = blocks(blocks(L, conv), steps)
    spread = Tile(taps, min(pixels, conv), 4, chunks, steps, N * chunks)
    fast = C if nhwc else L
    unit = next(u for u in (8, 4, 2, 1) if fast % u == 0)
    return Plan(
        nhwc, unit, **tiles, fold=small or (not nhwc and tiles["refine"].parts == 1), conv=conv, spread=spread
    )


@lru_cache(4096)
def gate_plan(N: int, C: int, H: int, processors: int) -> Gate:
    """The blocks of a gate of N samples, C channels and H hidden units."""
    if processors == INTERPRETED:
        return Gate(2, min(power(H), 4), 8, H <= 4)
    alone = H <= 64 and C <= 512
    hidden = power(H) if alone else 32
    samples = min(power(N), 4)
    channels = max(16, min(power(C), 4096 // (hidden * samples)))
    return Gate(samples, hidden, channels, alone)


def sums_plan(N: int, H: int, processors: int) -> tuple[int, int, int]:
    """Samples, hidden units and channels of a block of the parameters' gradients."""
    most = 4 if processors == INTERPRETED else 16
    return min(power(N), most), min(power(H), most), most


def statistics_plan(C: int, processors: int) -> tuple[int, int]:
    """Rows and channels of a block of BatchNorm's statistics."""
    return (8, 8) if processors == INTERPRETED else (64, min(power(C), 16))


def shape(C: int, L: int, nhwc: bool, elements: int, lanes: int, *, few: bool) -> tuple[int, int]:
    """[BC, BP]: full along the contiguous axis up to `lanes`, the other axis takes what is left."""
    if few:  # too few programs: smaller tiles
        elements //= 2
    if nhwc:
        BC = min(power(C), lanes)
        return BC, max(1, min(power(L), elements // BC))
    BP = min(power(L), lanes)
    return max(1, min(power(C), elements // BP)), BP


def power(n: int) -> int:
    """The power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def blocks(n: int, size: int) -> int:
    """n / size, rounded up."""
    return -(-n // size)
