"""The CPU kernels: the library of the companion package `cbam-native`, loaded on first use."""

import importlib

import torch

OPERATORS = 1  # the version of the schemas in library.py: increment it whenever one of them changes
# Without build isolation it is compiled for the installed torch, and hatchling must be installed first.
_INSTALL = "in a checkout: pip install hatchling; pip install --no-build-isolation ./native"


def missing() -> str:
    """Load the CPU kernels; return why they are unavailable, or an empty string."""
    try:
        module = importlib.import_module("cbam_native")
        path, operators = module.library(), getattr(module, "OPERATORS", 0)
    except ModuleNotFoundError:
        return f"cbam-native is not installed ({_INSTALL})"
    except (ImportError, AttributeError) as error:  # also the empty folder that an uninstall may leave
        return f"cbam_native is not the companion package of cbam: {error}"
    if operators != OPERATORS:
        return f"{path} was built for another version of cbam: reinstall cbam-native ({_INSTALL})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"cannot load {path}: {error}"
    return ""
