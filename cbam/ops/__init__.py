"""Tensor operations of attention: the equations, and the choice between their implementations."""

from cbam.ops.dispatch import tail
from cbam.ops.reference import (
    Channel,
    Norm,
    Spatial,
    channel_descriptor,
    max_and_mean,
    rescale,
    spatial_descriptor,
)
from cbam.ops.switch import fused, using

__all__ = [
    "Channel",
    "Norm",
    "Spatial",
    "channel_descriptor",
    "fused",
    "max_and_mean",
    "rescale",
    "spatial_descriptor",
    "tail",
    "using",
]
