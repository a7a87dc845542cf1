"""Attention modules and their short names."""

from collections.abc import Callable

from torch import nn

from cbam.nn.bam import BAM
from cbam.nn.cbam import CBAM, ChannelAttention, SpatialAttention, squeeze_excitation
from cbam.nn.coordinate import CoordAttention
from cbam.nn.eca import ECA
from cbam.nn.ema import EMA
from cbam.nn.gam import GAM
from cbam.nn.gct import GCT
from cbam.nn.global_context import GlobalContext
from cbam.nn.scse import SCSE
from cbam.nn.selective_kernel import SelectiveKernel
from cbam.nn.simam import SimAM
from cbam.nn.triplet import TripletAttention

__all__ = [
    "ATTENTION",
    "BAM",
    "CBAM",
    "ECA",
    "EMA",
    "GAM",
    "GCT",
    "SCSE",
    "ChannelAttention",
    "CoordAttention",
    "GlobalContext",
    "SelectiveKernel",
    "SimAM",
    "SpatialAttention",
    "TripletAttention",
    "squeeze_excitation",
]


def _spatial(channels: int, *, dim: int = 2) -> SpatialAttention:
    return SpatialAttention(dim=dim)


# name on the command line -> function of the channels; the modules keep the shape of their input
ATTENTION: dict[str, Callable[[int], nn.Module]] = {
    "cbam": CBAM,
    "se": squeeze_excitation,
    "channel": ChannelAttention,
    "spatial": _spatial,
    "eca": ECA,
    "scse": SCSE,
    "bam": BAM,
    "gc": GlobalContext,
    "coordatt": CoordAttention,
    "simam": SimAM,
    "triplet": TripletAttention,
    "gct": GCT,
    "sk": SelectiveKernel,
    "gam": GAM,
    "ema": EMA,
}
