"""The CPU kernels: a library of the companion distribution `cbam-native`, loaded on first use."""

import importlib

import torch

OPERATORS = 1  # the version of the schemas in library.py: raise it whenever one of them changes
# Without build isolation it is compiled for the installed torch, and hatchling has to be installed too.
_INSTALL = "in a checkout: pip install hatchling; pip install --no-build-isolation ./native"


def missing() -> str:
    """Load the CPU kernels; why they are missing, empty if they are not."""
    try:
        module = importlib.import_module("cbam_native")
        path, operators = module.library(), getattr(module, "OPERATORS", 0)
    except ModuleNotFoundError:
        return f"cbam-native is not installed ({_INSTALL})"
    except ImportError as error:
        return f"cbam_native is not the companion of cbam: {error}"
    if operators != OPERATORS:
        return f"{path} is of another version than cbam: install cbam-native anew ({_INSTALL})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    return ""
