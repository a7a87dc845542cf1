"""Networks for `torch.hub`: `torch.hub.load("<owner>/cbam", "resnet50_cbam", num_classes=10)`."""

dependencies = ["torch", "torchvision", "timm"]

from cbam import build, from_pretrained  # noqa: E402 - torch.hub reads `dependencies` first


def resnet18_cbam(num_classes: int = 1000):
    """ResNet18 with CBAM in its 8 blocks, initialised as the paper's code does."""
    return build("resnet18+cbam", num_classes=num_classes)


def resnet34_cbam(num_classes: int = 1000):
    """ResNet34 with CBAM in its 16 blocks, initialised as the paper's code does."""
    return build("resnet34+cbam", num_classes=num_classes)


def resnet50_cbam(num_classes: int = 1000):
    """ResNet50 with CBAM in its 16 blocks, initialised as the paper's code does."""
    return build("resnet50+cbam", num_classes=num_classes)


def resnet101_cbam(num_classes: int = 1000):
    """ResNet101 with CBAM in its 33 blocks, initialised as the paper's code does."""
    return build("resnet101+cbam", num_classes=num_classes)


def mobilenet_v2_cbam(num_classes: int = 1000):
    """MobileNetV2 with CBAM in its 10 blocks that have a shortcut, initialised as the paper's code does."""
    return build("mobilenet_v2+cbam", num_classes=num_classes)


__all__ = [
    "build",
    "from_pretrained",
    "mobilenet_v2_cbam",
    "resnet18_cbam",
    "resnet34_cbam",
    "resnet50_cbam",
    "resnet101_cbam",
]
