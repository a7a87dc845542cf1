"""Networks by name, bare or with attention, and what they cost."""

from cbam.models.catalogue import attentions, build, names
from cbam.models.cost import Cost, profile
from cbam.models.mobilenet_v1 import MobileNetV1
from cbam.models.resnet_tiny import ResNetTiny
from cbam.models.stride import stride_in_1x1
from cbam.models.variants import ConvSpatialAttention, Parallel

__all__ = [
    "ConvSpatialAttention",
    "Cost",
    "MobileNetV1",
    "Parallel",
    "ResNetTiny",
    "attentions",
    "build",
    "names",
    "profile",
    "stride_in_1x1",
]
