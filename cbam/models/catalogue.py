"""Networks by name: ours, torchvision's and timm's, bare or with attention.

A name is `[library:]network[+attention]`: "resnet50", "resnet50+cbam", "timm:resnet50+se". A bare network
name is ours if we have it, else torchvision's, else timm's. Nothing is downloaded.
"""

import difflib
import fnmatch
from types import ModuleType

from torch import nn

from cbam.errors import ConfigError, InputError, MissingExtraError
from cbam.models.resnet_tiny import ResNetTiny
from cbam.nn import CBAM, squeeze_excitation
from cbam.surgery import attach

_OURS = {"resnet_tiny": ResNetTiny}
_ATTENTIONS = {"se": squeeze_excitation, "cbam": CBAM}
_LIBRARIES = ("cbam", "torchvision", "timm")
# Their defaults hand out a tuple of logits while training, and announce a change of initialisation.
_PLAIN_OUTPUT = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def build(name: str, *, num_classes: int = 1000, start: str = "paper") -> nn.Module:
    """A freshly initialised network: `build("resnet50+cbam")`.

    Args:
        name: `[library:]network[+se|+cbam]`; library is `cbam`, `torchvision` or `timm`, and a name without
            one is ours, else torchvision's, else timm's. `names()` lists the networks.
        num_classes: outputs of the network.
        start: how attention begins, "paper" or "identity" (see `cbam.attach`).

    Raises:
        ConfigError: an unknown name, attention or start.
        InputError: num_classes is not a positive int.
        AttachError: the network has no place for attention.
        MissingExtraError: torchvision or timm is needed and absent.
    """
    network, attention = _split(name)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise InputError(f"num_classes must be a positive int, got {num_classes!r}")
    if start not in ("paper", "identity"):
        raise ConfigError(f'start must be "paper" or "identity", got {start!r}')
    library, network = _find(network)
    model = _create(library, network, num_classes)
    if attention:
        attach(model, None, _ATTENTIONS[attention], start=start)
    return model


def names(pattern: str = "") -> list[str]:
    """The networks that `build` knows, sorted, those of an absent library left out.

    A timm network whose bare name is torchvision's appears as `timm:<name>`.

    Args:
        pattern: part of a name, or a wildcard pattern such as "resnet*"; empty for all.
    """
    found = set(_OURS)
    for library in _LIBRARIES[1:]:
        try:
            listed = _listed(library)
        except MissingExtraError:
            continue
        found |= {f"{library}:{name}" if name in found else name for name in listed}
    wildcard = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    return sorted(fnmatch.filter(found, wildcard))


def _split(name: str) -> tuple[str, str]:
    """ "resnet50+cbam" -> ("resnet50", "cbam")."""
    if not isinstance(name, str):
        raise InputError(f"a network is named by a str, got {type(name).__name__}")
    network, plus, attention = name.partition("+")
    if plus and attention not in _ATTENTIONS:
        raise ConfigError(
            f"unknown attention {attention!r} in {name!r}: write {network}+se or {network}+cbam"
        )
    return network, attention


def _find(network: str) -> tuple[str, str]:
    """Which library has `network`, and its name there."""
    library, colon, bare = network.rpartition(":")
    if colon and library not in _LIBRARIES:
        raise ConfigError(
            f"unknown library {library!r} in {network!r}: expected one of {', '.join(_LIBRARIES)}"
        )
    for candidate in (library,) if colon else _LIBRARIES:
        if bare in _listed(candidate):
            return candidate, bare
    known = _listed(library) if colon else names()
    nearest = difflib.get_close_matches(bare.lower(), known, n=3, cutoff=0.0)
    raise ConfigError(f"unknown network {network!r}; nearest: {', '.join(nearest)}")


def _listed(library: str) -> list[str]:
    if library == "cbam":
        return list(_OURS)
    if library == "torchvision":
        models = _torchvision()
        return models.list_models(module=models)
    return _timm().list_models()


def _create(library: str, network: str, num_classes: int) -> nn.Module:
    if library == "cbam":
        return _OURS[network](num_classes)
    if library == "torchvision":
        extra = _PLAIN_OUTPUT.get(network, {})
        return _torchvision().get_model(network, weights=None, num_classes=num_classes, **extra)
    return _timm().create_model(network, pretrained=False, num_classes=num_classes)


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
