"""Which tiles the Triton kernels work in: a table by shape, layout, type and number of multiprocessors.

Nothing here looks at data, time or load, so that the order of every sum, and with it every bit of a result,
is the same in each run on one kind of device.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

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
    """The blocks of a step of the channel gate: samples, hidden units, channels; the warps that hold one."""

    samples: int
    hidden: int
    channels: int
    warps: int
    alone: bool = False  # one kernel for both layers


# Values that a thread holds of each tile, and the lanes along the contiguous axis that a tile may have, best
# first, (NCHW, NHWC). A program of pass 1 keeps four sums for each value, of A two to four, of B and 2 two.
TILES = {
    "pool": (8, (512, 256, 1024, 128), (128, 64)),
    "weigh": (8, (512, 256, 1024, 128), (128, 64)),
    "squeeze": (16, (256, 128, 64), (128, 256, 512)),
    "refine": (16, (512, 256, 128), (64, 128, 256)),
    "gradient": (8, (256, 128, 64, 32), (64, 128, 256, 512)),
    "write": (8, (512, 256, 128), (64, 128, 256)),
}
WALKS_PIXELS = ("pool", "weigh")
PARTS = {"pool": 16, "weigh": 16, "squeeze": 4, "refine": 8, "gradient": 1, "write": 8}  # at most
BLOCK = 1 << 16  # bytes of products that a step of the channel gate adds up at a time
ENOUGH = 4  # programs per multiprocessor; a pass with fewer is cut finer where the shape allows


@lru_cache(4096)
def plan(N: int, C: int, L: int, nhwc: bool, itemsize: int, processors: int) -> Plan:
    """The plan of a map (N, C, L) of `itemsize` bytes a value on a device of `processors` multiprocessors.

    It is that of the next power of two of N, so that the short last batch of an epoch compiles nothing anew.
    """
    tiles = {name: tile(name, N, C, L, nhwc, itemsize, processors) for name in TILES}
    small = power(N) * C * L * itemsize <= 1 << 23
    conv = min(power(L), 16 if processors == INTERPRETED else 256)
    chunks = max(min(blocks(L, conv), blocks(2 * processors, power(N))), blocks(L, 512))
    steps = blocks(blocks(L, conv), chunks)
    taps, pixels, warps = (32, 8, 1) if processors == INTERPRETED else (64, 256 // max(itemsize, 4), 8)
    chunks = blocks(blocks(L, conv), steps)
    spread = Tile(taps, min(pixels, conv), warps, chunks, steps, N * chunks)
    unit = next(u for u in (8, 4, 2, 1) if (C if nhwc else L) % u == 0)
    fold = small or (not nhwc and tiles["refine"].parts == 1)
    return Plan(nhwc, unit, **tiles, fold=fold, conv=conv, spread=spread)


def tile(name: str, N: int, C: int, L: int, nhwc: bool, itemsize: int, processors: int) -> Tile:
    """The first form of tile that makes enough programs, or the one that makes the most."""
    per_thread, *lanes = TILES[name]
    if itemsize == 8:
        per_thread //= 2
    if name not in WALKS_PIXELS and (C if nhwc else L) % 2:
        per_thread //= 2  # of an odd extent each value has an address of its own, and registers run out
    found: list[Tile] = []
    for warps, lane in product((8, 4, 2), lanes[nhwc]):
        if processors == INTERPRETED:
            warps, lane, per_thread = 1, 16, 4
        BC, BP = shape(C, L, nhwc, 32 * warps * per_thread, lane)
        over_pixels, over_channels = blocks(L, BP), blocks(C, BC)
        others, steps = (over_channels, over_pixels) if name in WALKS_PIXELS else (over_pixels, over_channels)
        programs = power(N) * others
        parts = max(1, min(steps, PARTS[name], blocks(ENOUGH * processors, programs)))
        steps = blocks(steps, parts)
        parts = blocks(
            blocks(C if name not in WALKS_PIXELS else L, BC if name not in WALKS_PIXELS else BP), steps
        )
        found.append(Tile(BC, BP, warps, parts, steps, N * others * parts))
        if programs >= ENOUGH * processors and parts == 1:
            return found[-1]
    return max(found, key=lambda t: min(t.programs // N * power(N), ENOUGH * processors))


@lru_cache(4096)
def gate_plan(N: int, C: int, H: int, itemsize: int, processors: int) -> Gate:
    """The blocks of a gate of N samples, C channels and H hidden units, computed in `itemsize` bytes.

    A program waits for memory once for each block of channels, so that few large blocks are what counts; and
    where programs are few, each takes fewer samples.
    """
    if processors == INTERPRETED:
        return Gate(2, min(power(H), 4), 8, 1, H <= 4)
    alone = H <= 64 and C <= 512
    hidden = power(H) if alone else 32
    samples = next(
        n for n in (4, 2, 1) if n == 1 or 2 * blocks(power(N), n) * blocks(H, hidden) >= processors
    )
    # Half a block for one sample: the weights of it pass through shared memory.
    channels = max(16, min(power(C), BLOCK // itemsize // (hidden * max(samples, 2))))
    warps = max(1, min(16, samples * hidden * channels * itemsize // (128 * 32)))
    return Gate(samples, hidden, channels, warps, alone)


def sums_plan(N: int, H: int, processors: int) -> Gate:
    """The blocks of the parameters' gradients, whose programs walk the samples."""
    if processors == INTERPRETED:
        return Gate(min(power(N), 4), min(power(H), 4), 4, 1)
    return Gate(min(power(N), 16), min(power(H), 16), 16, 8)


def statistics_plan(C: int, processors: int) -> tuple[int, int]:
    """Rows and channels of a block of BatchNorm's statistics."""
    return (8, 8) if processors == INTERPRETED else (64, min(power(C), 16))


def shape(C: int, L: int, nhwc: bool, elements: int, lanes: int) -> tuple[int, int]:
    """[BC, BP]: up to `lanes` along the contiguous axis, the other axis takes what is left."""
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
