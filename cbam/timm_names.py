"""Names for `timm.create_model`, such as "cbam_resnet50": timm networks with CBAM attached.

timm takes a second to import, but `import cbam` must cost nothing. So the names are registered when timm is
imported: at once if it is already, otherwise by a finder in Python's import system.
"""

import importlib.util
import logging
import sys
import threading
from importlib.machinery import ModuleSpec
from typing import Any

_log = logging.getLogger("cbam")
PREFIX = "cbam_"
NETWORKS = """
resnet18 resnet26 resnet34 resnet50 resnet50d resnet101 resnet152 resnext50_32x4d resnext101_32x8d
wide_resnet50_2 resnetv2_50 res2net50_26w_4s regnetx_002 regnety_004 mobilenetv2_100
mobilenetv3_large_100 mobilenetv3_small_100 efficientnet_b0 tf_efficientnet_lite0 convnext_atto
convnext_tiny convnextv2_atto ghostnet_100 dla34 darknet53 cspdarknet53 hrnet_w18_small
""".split()


class _RegisteringFinder:
    """An import finder that finds nothing itself, but registers the names once timm is imported."""

    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """timm's own spec, with a loader that also registers the names."""
        if name != "timm" or getattr(self._searching, "timm", False):
            return None
        self._searching.timm = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.timm = False
        if spec is None or spec.loader is None:
            return spec
        loader, load = spec.loader, spec.loader.exec_module

        def load_and_register(module) -> None:
            del loader.exec_module  # restores the loader's own method
            load(module)
            register_safely()

        loader.exec_module = load_and_register
        return spec


def watch() -> None:
    """Register now if timm is already imported, otherwise when it is."""
    if "timm" in sys.modules:
        register_safely()
    elif not any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisteringFinder())


def register_safely() -> None:
    """Register the names, but never make `import timm` fail."""
    try:
        register()
    except Exception as error:  # for example with another version of timm
        _log.warning("timm.create_model does not know cbam_*: %s: %s", type(error).__name__, error)


def register() -> None:
    """Register every network of NETWORKS that this timm has, as `cbam_<name>`."""
    from timm.models import is_model, register_model

    for network in NETWORKS:
        if is_model(network) and not is_model(PREFIX + network):
            register_model(_entry(network))


def _entry(network: str):
    def create(pretrained: bool = False, **kwargs: Any):
        import timm

        from cbam.surgery import attach

        model = timm.create_model(network, pretrained=pretrained, **kwargs)
        return attach(model, start="identity" if pretrained else "paper")

    create.__name__ = create.__qualname__ = PREFIX + network
    create.__doc__ = f"timm's {network} with CBAM; pretrained weights keep their function."
    return create
