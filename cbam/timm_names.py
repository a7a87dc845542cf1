"""`timm.create_model("cbam_resnet50")`: networks of timm with CBAM attached, under names of their own.

timm takes a second to import, and `import cbam` has to cost nothing. So nothing is registered until timm is
there: before `import timm`, `import cbam` leaves a note for Python's import system; after it, it registers.
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


class _Watch:
    """A finder that finds nothing itself: when timm has been imported, it registers the names."""

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """timm's own spec, its loader told to register when it is done."""
        if name != "timm" or getattr(self._asking, "timm", False):
            return None
        self._asking.timm = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.timm = False
        if spec is None or spec.loader is None:
            return spec
        loader, load = spec.loader, spec.loader.exec_module

        def load_and_register(module) -> None:
            del loader.exec_module  # the loader's own again
            load(module)
            register_safely()

        loader.exec_module = load_and_register
        return spec


def watch() -> None:
    """Register now if timm is imported already, and else when it is."""
    if "timm" in sys.modules:
        register_safely()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def register_safely() -> None:
    """Register; what goes wrong is no reason for `import timm` to fail."""
    try:
        register()
    except Exception as error:  # another version of timm
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
    create.__doc__ = f"timm's {network} with CBAM; weights of the plain network keep their function."
    return create
