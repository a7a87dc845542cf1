"""Networks by name, plain or with attention, their cost, and detectors built on them."""

from cbam.models.catalogue import attentions, build, names
from cbam.models.cost import Cost, profile
from cbam.models.detectors import detector, faster_rcnn, faster_rcnn_c4, retinanet
from cbam.models.frozen import freeze_norm
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
    "detector",
    "faster_rcnn",
    "faster_rcnn_c4",
    "freeze_norm",
    "names",
    "profile",
    "retinanet",
    "stride_in_1x1",
]
