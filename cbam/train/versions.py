"""The software versions that a run was made with."""

import importlib
import importlib.metadata
import platform

import cbam

PACKAGES = ("torch", "triton", "torchvision", "timm", "pytorch-lightning", "torchcam", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of Python, cbam and its dependencies."""
    found = {"cbam": cbam.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if kernels := native():
        found["cbam-native"] = "+".join(part for part in (kernels[0], kernels[1][:12]) if part)
    return found


def native() -> tuple[str, str] | None:
    """The version of cbam-native and a digest of its sources; None if it is not installed.

    The digest is "" for older versions, which do not have it.
    """
    try:
        module = importlib.import_module("cbam_native")
        version = module.__version__
    except (ImportError, AttributeError):
        return None
    try:
        return version, module.sources()
    except (AttributeError, OSError):
        return version, ""
