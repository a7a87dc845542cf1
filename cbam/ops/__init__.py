"""Tensor operations of attention: equations, and the choice between their implementations."""

from cbam.ops.reference import channel_descriptor, max_and_mean, rescale, spatial_descriptor
from cbam.ops.switch import using

__all__ = ["channel_descriptor", "max_and_mean", "rescale", "spatial_descriptor", "using"]
