"""Attention modules."""

from cbam.nn.cbam import CBAM, ChannelAttention, SpatialAttention, squeeze_excitation

__all__ = ["CBAM", "ChannelAttention", "SpatialAttention", "squeeze_excitation"]
