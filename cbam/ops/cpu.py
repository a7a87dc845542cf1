"""The CPU kernels: a library of the companion distribution `cbam-native`, loaded on first use."""

import importlib

import torch

# With no isolation it is compiled for the torch that is there, and hatchling has to be there too.
_INSTALL = "in a checkout: pip install hatchling; pip install --no-build-isolation ./native"


def missing() -> str:
    """Why the CPU kernels are not there, or nothing where they are; loads them."""
    try:
        path = importlib.import_module("cbam_native").library()
    except ModuleNotFoundError:
        return f"cbam-native is not installed ({_INSTALL})"
    except ImportError as error:
        return f"cbam_native is not the companion of cbam: {error}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("cbam::tail_inference", "CPU"):
        return f"{path} is of an older version than cbam: install cbam-native anew ({_INSTALL})"
    return ""
