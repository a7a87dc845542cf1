"""Networks by name: ours, torchvision's and timm's, plain or with attention.

A name is `[library:]network[+attention]`: "resnet50", "resnet50+cbam", "timm:resnet50+se". Without a library
it is ours if we have it, else torchvision's, else timm's. Nothing is downloaded.

Ours are the networks in the paper's tables that the libraries lack. `mobilenet_v1` and `wide_resnet18` accept
any width: `mobilenet_v1_0.35`.
"""

import difflib
import fnmatch
import re
from types import ModuleType

from torch import nn

from cbam.errors import ConfigError, InputError, MissingExtraError, NoPlaceError
from cbam.models.mobilenet_v1 import MobileNetV1
from cbam.models.resnet_tiny import ResNetTiny
from cbam.models.stride import stride_in_1x1
from cbam.models.variants import VARIANTS
from cbam.nn import ATTENTION, door
from cbam.surgery import attach

ATTENTIONS = ATTENTION | VARIANTS
_OF_TORCH = ("resnet_tiny", "mobilenet_v1", "mobilenet_v1_0.7")
_OF_TORCHVISION = ("resnext101_32x4d", "wide_resnet18_1.5", "wide_resnet18_2.0")
_WIDTH = re.compile(r"(mobilenet_v1|wide_resnet18)_([0-9]+(?:\.[0-9]+)?)")
_LIBRARIES = ("cbam", "torchvision", "timm")
# By default they return a tuple of logits in training mode, and warn about a change of initialisation.
_PLAIN_OUTPUT = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def build(name: str, *, num_classes: int = 1000, start: str = "paper", stride_in: str = "3x3") -> nn.Module:
    """Build a freshly initialised network: `build("resnet50+cbam")`.

    Args:
        name: `[library:]network[+attention]`; library is `cbam`, `torchvision` or `timm`, and a name without
            one is ours, else torchvision's, else timm's. `names()` lists the networks, `attentions()` the
            attention modules.
        num_classes: number of outputs.
        start: how attention is initialised: "paper", for training from scratch, as in the paper; or
            "identity", the default of `cbam.attach`, for networks that may be trained already.
        stride_in: where bottleneck blocks stride: "3x3" leaves them as the library has them, "1x1" moves
            the stride into the convolution before, as the multiply-accumulates in the paper assume.

    Raises:
        ConfigError: an unknown name, attention, start or stride_in, or no bottleneck block for stride_in.
        InputError: num_classes is not a positive int.
        AttachError: the network has no place for attention.
        MissingExtraError: torchvision or timm is needed but not installed.
    """
    network, attention = _split(name)
    door.check_count("num_classes", num_classes)
    if start not in ("paper", "identity"):
        raise ConfigError(f'start must be "paper" or "identity", got {start!r}')
    if stride_in not in ("3x3", "1x1"):
        raise ConfigError(f'stride_in must be "3x3" or "1x1", got {stride_in!r}')
    library, bare = _find(network)
    model = _create(library, bare, num_classes)
    if stride_in == "1x1" and not stride_in_1x1(model):
        raise ConfigError(
            f'stride_in="1x1": {network} has no bottleneck block that strides in a 3x3 convolution; '
            "leave stride_in out"
        )
    if attention:
        where = MobileNetV1.UNITS if isinstance(model, MobileNetV1) else None
        try:
            attach(model, where, ATTENTIONS[attention], start=start)
        except NoPlaceError as error:
            raise NoPlaceError(f'{error} to cbam.attach(cbam.build("{network}"), ...)') from None
    return model


def attentions() -> list[str]:
    """The attention modules that `build` knows, sorted: `build(f"resnet50+{name}")`."""
    return sorted(ATTENTIONS)


def names(pattern: str = "") -> list[str]:
    """The networks that `build` knows, sorted, without those of libraries that are not installed.

    A timm network with the name of a torchvision network appears as `timm:<name>`.

    Args:
        pattern: part of a name, or a wildcard pattern such as "resnet*"; empty for all.
    """
    found: set[str] = set()
    for library in _LIBRARIES:
        try:
            listed = _listed(library)
        except MissingExtraError:
            continue
        found |= {f"{library}:{name}" if name in found else name for name in listed}
    if not _has_torchvision():
        found -= set(_OF_TORCHVISION)
    wildcard = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    return sorted(fnmatch.filter(found, wildcard))


def _split(name: str) -> tuple[str, str]:
    """ "resnet50+cbam" -> ("resnet50", "cbam")."""
    if not isinstance(name, str):
        raise InputError(f"the name of a network must be a str, got {type(name).__name__}")
    network, plus, attention = name.partition("+")
    if plus and attention not in ATTENTIONS:
        known = ", ".join(attentions())
        raise ConfigError(f"unknown attention {attention!r} in {name!r}; expected one of {known}")
    return network, attention


def _find(network: str) -> tuple[str, str]:
    """The library that has `network`, and its name there."""
    library, colon, bare = network.rpartition(":")
    if colon and library not in _LIBRARIES:
        raise ConfigError(
            f"unknown library {library!r} in {network!r}: expected one of {', '.join(_LIBRARIES)}"
        )
    for candidate in (library,) if colon else _LIBRARIES:
        if bare in _listed(candidate) or (candidate == "cbam" and _WIDTH.fullmatch(bare)):
            return candidate, bare
    known = _listed(library) if colon else names()
    nearest = difflib.get_close_matches(bare.lower(), known, n=3, cutoff=0.0)
    raise ConfigError(f"unknown network {network!r}; nearest: {', '.join(nearest)}")


def _listed(library: str) -> list[str]:
    if library == "cbam":
        return [*_OF_TORCH, *_OF_TORCHVISION]
    if library == "torchvision":
        models = _torchvision()
        return models.list_models(module=models)
    return _timm().list_models(exclude_filters="cbam_*")  # registered by cbam/timm_names.py


def _create(library: str, network: str, num_classes: int) -> nn.Module:
    if library == "cbam":
        return _create_ours(network, num_classes)
    if library == "torchvision":
        extra = _PLAIN_OUTPUT.get(network, {})
        return _torchvision().get_model(network, weights=None, num_classes=num_classes, **extra)
    return _timm().create_model(network, pretrained=False, num_classes=num_classes)


def _create_ours(network: str, num_classes: int) -> nn.Module:
    family, width = match.groups() if (match := _WIDTH.fullmatch(network)) else (network, "1")
    if family == "resnet_tiny":
        return ResNetTiny(num_classes)
    if family == "mobilenet_v1":
        return MobileNetV1(num_classes, width=float(width))
    _torchvision()
    from cbam.models import resnet

    if family == "wide_resnet18":
        return resnet.wide_resnet18(num_classes, width=float(width))
    return resnet.resnext101_32x4d(num_classes)


def _has_torchvision() -> bool:
    try:
        _torchvision()
    except MissingExtraError:
        return False
    return True


def _torchvision() -> ModuleType:
    try:
        import torchvision.models
    except ImportError as error:
        raise MissingExtraError.of("a torchvision network", "vision") from error
    return torchvision.models


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError.of("a timm network", "vision") from error
    return timm
