"""The tile sizes of the Triton kernels, by shape, layout, type and number of multiprocessors.

Nothing here depends on data, time or load, so that the order of every sum, and with it every bit of a result,
is the same in each run on one kind of device.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

INTERPRETED = 4  # the number of multiprocessors that the CPU counts as


@dataclass(frozen=True)
class Tile:
    """[channels, pixels] of a tile, its warps, and the split of the axis that a program loops over.

    The axis is split into `parts`, one program each, of `steps` tiles; none is empty.
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
    unit: int  # the largest of 8, 4, 2, 1 that divides the contiguous extent
    pool: Tile  # A and 2 loop over the pixels
    weigh: Tile
    squeeze: Tile  # B, C, 1 and 3 loop over the channels
    refine: Tile
    gradient: Tile
    write: Tile
    fold: bool  # in eval mode, do the convolution inside pass C
    conv: int  # pixels per program of the convolution
    spread: Tile  # spatial gradient: [taps, pixels]; parts of a sample, each of `steps` tiles of `conv`


@dataclass(frozen=True)
class Gate:
    """The block of a step of the channel gate: samples, hidden units, channels; the warps that hold it."""

    samples: int
    hidden: int
    channels: int
    warps: int
    single_kernel: bool = False  # one kernel for both layers


# Values per thread of each tile, and the possible lanes along the contiguous axis, best first, (NCHW, NHWC).
# For each value a program keeps four sums in pass 1, two to four in A, two in B and 2.
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
BLOCK = 1 << 16  # bytes of products that a step of the channel gate sums at a time
ENOUGH = 4  # programs per multiprocessor; a pass with fewer is split further if the shape allows


@lru_cache(4096)
def plan(N: int, C: int, L: int, nhwc: bool, itemsize: int, processors: int) -> Plan:
    """The plan of a map (N, C, L) of `itemsize` bytes a value on a device of `processors` multiprocessors.

    It is that of N rounded up to a power of two, so that the short last batch of an epoch recompiles nothing.
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
    """The first tile shape that gives enough programs, or the one that gives the most."""
    per_thread, *lanes = TILES[name]
    if itemsize == 8:
        per_thread //= 2
    if name not in WALKS_PIXELS and (C if nhwc else L) % 2:
        per_thread //= 2  # with an odd extent each value has its own address, and registers run out
    candidates: list[Tile] = []
    for warps, lane in product((8, 4, 2), lanes[nhwc]):
        if processors == INTERPRETED:
            warps, lane, per_thread = 1, 16, 4
        BC, BP = shape(C, L, nhwc, 32 * warps * per_thread, lane)
        over_pixels, over_channels = blocks(L, BP), blocks(C, BC)
        others, steps = (over_channels, over_pixels) if name in WALKS_PIXELS else (over_pixels, over_channels)
        programs = power(N) * others
        parts = max(1, min(steps, PARTS[name], blocks(ENOUGH * processors, programs)))
        walked, steps = steps, blocks(steps, parts)
        parts = blocks(walked, steps)
        candidates.append(Tile(BC, BP, warps, parts, steps, N * others * parts))
        if programs >= ENOUGH * processors and parts == 1:
            return candidates[-1]
    return max(candidates, key=lambda t: min(t.programs // N * power(N), ENOUGH * processors))


@lru_cache(4096)
def gate_plan(N: int, C: int, H: int, itemsize: int, processors: int) -> Gate:
    """The blocks of a gate of N samples, C channels and H hidden units, computed in `itemsize` bytes.

    A program waits for memory once per block of channels, so few large blocks are best; if there are few
    programs, each takes fewer samples.
    """
    if processors == INTERPRETED:
        return Gate(2, min(power(H), 4), 8, 1, H <= 4)
    single_kernel = H <= 64 and C <= 512
    hidden = power(H) if single_kernel else 32
    samples = next(
        n for n in (4, 2, 1) if n == 1 or 2 * blocks(power(N), n) * blocks(H, hidden) >= processors
    )
    # Half a block for one sample, because its weights pass through shared memory.
    channels = max(16, min(power(C), BLOCK // itemsize // (hidden * max(samples, 2))))
    warps = max(1, min(16, samples * hidden * channels * itemsize // (128 * 32)))
    return Gate(samples, hidden, channels, warps, single_kernel)


def sums_plan(N: int, H: int, processors: int) -> Gate:
    """The blocks of the parameters' gradients, whose programs loop over the samples."""
    if processors == INTERPRETED:
        return Gate(min(power(N), 4), min(power(H), 4), 4, 1)
    return Gate(min(power(N), 16), min(power(H), 16), 16, 8)


def statistics_plan(C: int, processors: int) -> tuple[int, int]:
    """Rows and channels of a block of BatchNorm's statistics."""
    return (8, 8) if processors == INTERPRETED else (64, min(power(C), 16))


def shape(C: int, L: int, nhwc: bool, elements: int, lanes: int) -> tuple[int, int]:
    """[BC, BP]: up to `lanes` along the contiguous axis; the other axis gets the rest."""
    if nhwc:
        BC = min(power(C), lanes)
        return BC, max(1, min(power(L), elements // BC))
    BP = min(power(L), lanes)
    return max(1, min(power(C), elements // BP)), BP


def power(n: int) -> int:
    """n rounded up to a power of two."""
    return 1 << (n - 1).bit_length()


def blocks(n: int, size: int) -> int:
    """n / size, rounded up."""
    return -(-n // size)
