"""How a checkpoint, a published folder, or a file of weights, does on the pictures that validate."""

import dataclasses
from pathlib import Path

from torch import nn

from cbam import hub
from cbam.data import BoxedImages, Images
from cbam.data.digits import NAME
from cbam.errors import CheckpointNotFoundError, ConfigError, OtherClassesError
from cbam.models.detectors import DETECTORS
from cbam.surgery import load_weights
from cbam.train import checkpoint
from cbam.train.average import average_of
from cbam.train.fitting import Detections, Evaluation, evaluate, evaluate_detector, pick_device
from cbam.train.material import began_with, network, ours, pictures
from cbam.train.recipes import Config

_Candidate = tuple[nn.Module, Images | BoxedImages, str]  # the network, its pictures, its name


def score(
    path: Path,
    *,
    data: str | None = None,
    model: str | None = None,
    size: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    workers: int = 0,
) -> tuple[Evaluation | Detections, str]:
    """Evaluate a checkpoint of `run`, or the weights of a named network; and say on what.

    Of a run that averages its weights it is the average.

    Args:
        path: of a checkpoint, of a run's folder (its newest valid one), of a folder of `save_pretrained`, or
            of a weights file.
        data: image folder, whose validation pictures are taken, for a detector one of COCO or Pascal VOC;
            None: what the run was trained on, or the digits.
        model: the network of a weights file; a checkpoint and a published folder know their own.
        size: side of the pictures; a checkpoint and a published folder know their own.
        batch_size: None for 256, of a detector 8.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `checkpoint.load`, `from_pretrained` and `load_weights`.
        ConfigError: no model is named, or the classes are not the network's.
        NonFiniteError: the network gives NaN.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: no such file")
    pick_device(device)
    if hub.is_published(path):
        net, val, name = _published(path, data, model, size)
    elif path.is_dir() or checkpoint.step_of(path) >= 0:
        net, val, name = _trained(path, data, model, size)
    else:
        net, val, name = _weights(path, data, model, size)
    if isinstance(val, BoxedImages):
        scored = evaluate_detector(net, val, batch_size=batch_size or 8, device=device, workers=workers)
    else:
        scored = evaluate(net, val, batch_size=batch_size or 256, device=device, workers=workers)
    return scored, f"{name} on {len(val)} validation pictures of {val.name}"


def _published(path: Path, data: str | None, model: str | None, size: int | None) -> _Candidate:
    """A folder of `save_pretrained`: its card says how pictures come to it."""
    if model is not None:
        raise ConfigError(f"{path} says what network it is: leave --model out")
    net, card = hub.from_pretrained(path), hub.card_of(path)
    if data is None and card.data != NAME:
        raise ConfigError(f"{path} knows no pictures here: give DATA, a folder of them")
    _, val = pictures(Config("folder", data=data, size=size or card.size if data else None))
    assert not isinstance(val, BoxedImages)
    if not card.classes:
        raise ConfigError(f"{path}: its card does not name the classes, so no answer of its can be judged")
    _check_classes(val, card.classes, str(path))
    val.mean, val.std = card.mean, card.std
    return net, val, path.resolve().name


def _trained(path: Path, data: str | None, model: str | None, size: int | None) -> _Candidate:
    state = ours(path)
    began = began_with(state)
    config = dataclasses.replace(
        began, model=model or began.model, size=size or began.size, data=data or began.data,
        recipe=began.recipe if began.detects else "folder",
    )  # fmt: skip
    _, val = pictures(config)
    _check_classes(val, state["data"]["classes"], "the run")
    net = network(config, len(val.classes), loaded=True)
    load_weights(net, average_of(state))
    return net, val, config.model


def _weights(path: Path, data: str | None, model: str | None, size: int | None) -> _Candidate:
    if model is None:
        raise ConfigError(f"{path} does not say what network it is: give --model NAME, see `cbam list`")
    detects = model.partition(":")[0] in DETECTORS
    config = Config(
        "detect/short" if detects else "folder", data=data, model=model, size=size,
        augment="none" if detects else None,
    )  # fmt: skip
    _, val = pictures(config)
    net = network(config, len(val.classes))
    try:
        load_weights(net, path)
    except OtherClassesError as error:
        here = f"there are {len(val.classes)} in {val.name}"
        raise error.advising(f"give DATA, pictures in a folder for each of them; {here}") from None
    return net, val, model


def _check_classes(val: Images | BoxedImages, classes, of: str) -> None:
    if list(val.classes) != list(classes):
        raise ConfigError(f"{val.name} has other classes than {of}: {str(val.classes)[:120]}")
