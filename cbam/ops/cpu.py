"""The CPU kernels: a library of the companion distribution `cbam-native`, loaded on first use."""

import importlib

import torch

OPERATORS = 1  # of the schemas in library.py: another number whenever one of them changes
# With no isolation it is compiled for the torch that is there, and hatchling has to be there too.
_INSTALL = "in a checkout: pip install hatchling; pip install --no-build-isolation ./native"


def missing() -> str:
    """Why the CPU kernels are not there, or nothing where they are; loads them."""
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
