"""Checks of arguments and inputs that all attention modules share, done before any work.

Call them through this module, as in `door.check_fits(x, ...)`: they read shapes and dtypes, which a symbolic
trace does not know, and `torch.fx.wrap` keeps them as leaves only if their names are looked up here.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from cbam.errors import DtypeError, InputError
from cbam.ops.reference import FLOATS, batched, other_dim

_log = logging.getLogger("cbam")

torch.fx.wrap("feature_map")
torch.fx.wrap("check_fits")
torch.fx.wrap("check_statistics")


def check_count(name: str, value: int) -> None:
    """Raise unless `value` is a positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a positive int, got {value!r}")


def check_odd(name: str, value: int) -> None:
    """Raise unless `value` is a positive odd int, so that a kernel of this size has a centre."""
    check_count(name, value)
    if value % 2 == 0:
        raise InputError(f"{name} must be odd, got {value}")


def check_dim(dim: int) -> None:
    """Raise unless `dim` is a number of spatial dimensions for which torch has convolutions."""
    if type(dim) is not int or dim not in (1, 2, 3):
        raise InputError(f"dim, the number of spatial dimensions, must be 1, 2 or 3, got {dim!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def divisor(name: str, value: int, channels: int) -> int:
    """The largest divisor of `channels` up to `value`; logged if it differs from `value`."""
    check_count(name, value)
    found = next(d for d in range(min(value, channels), 0, -1) if channels % d == 0)
    if found != value:
        _log.info("%d channels: using %s=%d instead of %d", channels, name, found, value)
    return found


def weight_of(layer: nn.Module) -> Any:
    """The weight to check inputs against; None if a replaced forward may load it first (offloading)."""
    return None if "forward" in layer.__dict__ else layer.weight


def feature_map(x: Tensor, channels: int, weight: Tensor | None) -> Tensor:
    """Check `x` against the module and return it as (N, C, H, W).

    Raises:
        InputError: not a feature map, an empty one, or one whose channels or device differ from the module's.
        DtypeError: not float16, bfloat16, float32 or float64; or, outside autocast, not the module's dtype.
    """
    check_fits(x, channels, weight)
    return batched(x)


def check_fits(x: Tensor, channels: int | None, weight: Tensor | None, dim: int = 2) -> None:
    """Raise if the channels, device or dtype of `x` differ from the module's.

    `weight` must belong to a layer without a ReLU after it: quantisation fuses such a pair, and a traced
    graph that still reads the layer's weight here would break.
    """
    if torch.jit.is_tracing():
        return
    if not (isinstance(x, Tensor) or hasattr(x, "__torch_function__")):
        raise InputError(f"expected a torch.Tensor, got {type(x).__name__}")
    if channels is not None and x.dim() in (dim + 1, dim + 2) and x.shape[-dim - 1] != channels:
        raise InputError(
            f"built for {channels} channels, got {x.shape[-dim - 1]} in shape {tuple(x.shape)}"
            f"{other_dim(x, dim) if x.shape[1] == channels else ''}"
        )
    if not isinstance(weight, Tensor):  # in a quantised layer a method that unpacks the weight
        return
    if x.device != weight.device:
        raise InputError(f"x is on {x.device}, the weights are on {weight.device}; move one of them")
    other = x.dtype != weight.dtype and x.dtype in FLOATS
    if other and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):  # meta has no autocast
        raise DtypeError(
            f"x is {x.dtype}, the weights are {weight.dtype}: use torch.autocast, or convert one of them"
        )


def check_statistics(x: Tensor) -> None:
    """Raise if (N, C, ...) has only one value per channel, which leaves BatchNorm without a variance."""
    if not torch.jit.is_tracing() and x.numel() == x.shape[1]:
        raise InputError(
            f"Expected more than 1 value per channel when training, got shape {tuple(x.shape)} to normalise; "
            "use eval(), a larger batch or a larger map"
        )
