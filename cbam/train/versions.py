"""What a run was made with."""

import importlib.metadata
import platform

import cbam

PACKAGES = ("torch", "triton", "torchvision", "timm", "pytorch-lightning", "torchcam", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of Python, of cbam and of what it stands on."""
    found = {"cbam": cbam.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
