"""Networks by name, bare or with attention, and what they cost."""

from cbam.models.catalogue import build, names
from cbam.models.cost import Cost, profile
from cbam.models.resnet_tiny import ResNetTiny

__all__ = ["Cost", "ResNetTiny", "build", "names", "profile"]
