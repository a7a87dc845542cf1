"""Trained networks given on the command line, as a `Viewer`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from cbam.app.source import Source, normalised, refuse_normalisation, source
from cbam.data import cluttered_digits
from cbam.data.digits import NAME
from cbam.data.pictures import short_side
from cbam.errors import CheckpointNotFoundError, ConfigError, OtherClassesError
from cbam.explain.looking import Viewer, default_viewer
from cbam.explain.pair import class_names
from cbam.hub import Card
from cbam.models import build
from cbam.models.detectors import DETECTORS
from cbam.train import checkpoint
from cbam.train.material import load_trained, unnamed


def viewer(
    model: str | None,
    weights: str | None,
    compare: list[str],
    classes: str | None,
    size: int | None,
    *,
    digits: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Viewer:
    """Load the default pair, one network with its weights, or several to compare.

    Args:
        model: a network of `cbam.build`; not needed for a checkpoint of `cbam train`.
        weights: its weights file.
        compare: NAME=FILE each. If a file does not name its network, NAME "plain" means `model`, and any
            other NAME means `model` with that attention.
        classes: a file with one class name per line; by default those of the checkpoint, or ImageNet's.
        size: side of the network input in pixels; by default that of the checkpoint, or 224.
        digits: use classes, size and normalisation of the cluttered digits by default.
        mean, std: normalisation with which weights files were trained, per channel; by default ImageNet's.

    Raises:
        ConfigError: inconsistent arguments. CheckpointError: a file does not match its network.
    """
    if weights is not None and compare:
        raise ConfigError("give --weights FILE or --compare NAME=FILE ..., not both")
    if weights is None and not compare:
        if model is not None:
            raise ConfigError("--model needs --weights FILE: an untrained network has nothing to show")
        if classes or size or mean or std:
            raise ConfigError("--classes, --size, --mean and --std need --weights or --compare")
        if digits:
            raise ConfigError(
                "the digits need networks trained on them, such as a run of `cbam train digits`: give "
                "--weights or --compare"
            )
        return default_viewer()
    names = lines_of(classes) if classes else None
    parts = [named(text) for text in compare] if compare else [("network", weights or "")]
    how = bool(compare), digits, mean, std
    loaded = [_load(label, Path(file), model, names, size, *how) for label, file in parts]
    if len({label for label, _ in parts}) < len(parts):
        raise ConfigError("--compare: each network needs a different name")
    if any(about != loaded[0][2] for *_, about in loaded):
        raise ConfigError("--compare: the networks were trained on different classes or sizes of images")
    networks = {label: net for (label, _), (_, net, _) in zip(parts, loaded, strict=True)}
    about = [f"{label}: {description}" for (label, _), (description, *_) in zip(parts, loaded, strict=True)]
    return Viewer(networks, about=about, mode="bilinear", **loaded[0][2])


def named(text: str) -> tuple[str, str]:
    """Split NAME=FILE."""
    label, equals, file = text.partition("=")
    if not (label and equals and file):
        raise ConfigError(f"--compare takes NAME=FILE, such as plain=a.safetensors, got {text!r}")
    return label, file


def _load(
    label: str,
    file: Path,
    model: str | None,
    names: list[str] | None,
    size: int | None,
    arms: bool,
    digits: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[str, nn.Module, dict[str, Any]]:
    """A description, the network, and its classes and preprocessing as fields of a `Viewer`."""
    if not file.exists():
        raise CheckpointNotFoundError(f"{file}: no such file")
    if file.is_dir() or checkpoint.is_ours(file):
        refuse_normalisation(file, mean, std)
        found = source(str(file), None, None)
        if not (known := names or list(found.card.classes)):
            raise ConfigError(f"{file} does not name its classes: give --classes FILE, one name per line")
    else:
        found = _of_weights(label, file, model, names, arms, digits, mean, std)
        known = list(found.card.classes)
    card, side = found.card, size or found.card.size
    how: dict[str, Any] = {"classes": known, "size": side, "mean": card.mean, "std": card.std}
    if card.resize and side == card.size and not digits:
        how["resized"] = card.resize
    else:
        how["resized"] = side if digits or card.data == NAME else short_side(side)
    return found.description, found.network.eval(), how


def _of_weights(
    label: str,
    file: Path,
    model: str | None,
    names: list[str] | None,
    arms: bool,
    digits: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Source:
    """Load a weights file; it has only tensors, so network, classes and normalisation come from options."""
    if model is None:
        raise unnamed(file)
    if model.partition(":")[0] in DETECTORS:
        raise ConfigError(f"{model} is a detector: give --detect")
    card = Card()
    if digits:
        _, val = cluttered_digits()
        card, names = Card(size=val.size, mean=val.mean, std=val.std), names or val.classes
    name, names = f"{model}+{label}" if arms and label != "plain" else model, names or class_names()
    net = build(name, num_classes=len(names))
    try:
        load_trained(net, file, name, file)
    except OtherClassesError as error:
        raise error.advising("give --classes FILE with as many names, one per line") from None
    card = normalised(card, mean, std, None if digits else net, name)
    return Source(net, f"{name}, weights of {file}", name, replace(card, classes=tuple(names)))


def lines_of(path: str) -> list[str]:
    """The names in a file, one per line."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not text'})"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ConfigError(f"{path}: no class names; expected one per line")
    return names
