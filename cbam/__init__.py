"""Channel and spatial attention for any CNN in PyTorch (CBAM, ECCV 2018, arXiv 1807.06521).

    import cbam
    model = cbam.attach(model)          # bit-identical output, every existing key kept
    model = cbam.detach(model)          # the exact inverse

`import cbam` needs only torch, and imports even that on the first use of a name.
"""

import importlib
from typing import TYPE_CHECKING

from cbam import timm_names as _timm_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cbam import data, explain, hub, models, nn, ops, portable, studies, surgery, train
    from cbam.errors import CBAMError
    from cbam.hub import from_pretrained, save_pretrained
    from cbam.models import build
    from cbam.nn import CBAM, ChannelAttention, SpatialAttention
    from cbam.portable import export
    from cbam.surgery import attach, bypassed, convert_state_dict, detach, load_weights, sites

_HOME = {
    "CBAM": "cbam.nn",
    "CBAMError": "cbam.errors",
    "ChannelAttention": "cbam.nn",
    "SpatialAttention": "cbam.nn",
    "attach": "cbam.surgery",
    "build": "cbam.models",
    "bypassed": "cbam.surgery",
    "convert_state_dict": "cbam.surgery",
    "detach": "cbam.surgery",
    "export": "cbam.portable",
    "from_pretrained": "cbam.hub",
    "load_weights": "cbam.surgery",
    "save_pretrained": "cbam.hub",
    "sites": "cbam.surgery",
}
_ROOMS = (
    "data",
    "errors",
    "explain",
    "hub",
    "models",
    "nn",
    "ops",
    "portable",
    "studies",
    "surgery",
    "train",
)

__all__ = [  # noqa: RUF022 - in the order a reader needs them
    "CBAM",
    "ChannelAttention",
    "SpatialAttention",
    "attach",
    "detach",
    "bypassed",
    "sites",
    "load_weights",
    "convert_state_dict",
    "build",
    "export",
    "from_pretrained",
    "save_pretrained",
    "CBAMError",
    "data",
    "explain",
    "hub",
    "models",
    "nn",
    "ops",
    "portable",
    "studies",
    "surgery",
    "train",
]


def __getattr__(name: str):
    if name not in _HOME and name not in _ROOMS:
        raise AttributeError(f"module 'cbam' has no attribute {name!r}")
    try:
        room = importlib.import_module(_HOME.get(name, f"cbam.{name}"))
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise importlib.import_module("cbam.errors").MissingExtraError.torch() from error
    value = getattr(room, name) if name in _HOME else room
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_timm_names.watch()
