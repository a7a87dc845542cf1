"""Evaluation of a checkpoint, a published folder or a weights file on the validation images."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from cbam import hub
from cbam.data import BoxedImages, Images
from cbam.data.digits import NAME
from cbam.data.parquet import evaluation_set
from cbam.data.pictures import Validation
from cbam.errors import CheckpointNotFoundError, ConfigError, DataError, OtherClassesError
from cbam.models.detectors import DETECTORS
from cbam.train import checkpoint
from cbam.train.average import average_of
from cbam.train.fitting import Detections, Evaluation, evaluate, evaluate_detector, pick_device
from cbam.train.material import about, load_trained, network, ours, pictures, settings_of, unnamed
from cbam.train.recipes import Config

_Set = Images | BoxedImages
_Candidate = tuple[nn.Module, _Set, str]  # the network, its images, and a description of both


def score(
    path: Path,
    *,
    data: str | None = None,
    model: str | None = None,
    size: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    workers: int = 0,
    held_out: bool = False,
) -> tuple[Evaluation | Detections, str]:
    """Evaluate a checkpoint of `run`, or the weights of a named network; also return what was evaluated.

    A run that keeps an average of its weights (EMA) is evaluated with the average.

    Args:
        path: of a checkpoint, a run's folder (its newest valid checkpoint), a folder of `save_pretrained`,
            or a weights file.
        data: image folder, for a detector in COCO or Pascal VOC layout; None for what the run was trained
            on, or the digits. Its validation images are used. If a folder of classes has none, all its
            images are used, or for the folder that the run was trained on only those held out.
        model: the network of a weights file; checkpoints and published folders record theirs.
        size: side of the images; checkpoints and published folders record theirs.
        batch_size: None for 256, or 8 for a detector.
        held_out: for any folder of classes without validation images, use those that training on it would
            hold out.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `checkpoint.load`, `from_pretrained` and `load_weights`.
        ConfigError: no model is named, the classes are not the network's, or the folder that a run held
            images out of has changed since.
        NonFiniteError: the network gives NaN.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: no such file")
    pick_device(device)
    if hub.is_published(path):
        net, val, description = _published(path, data, model, size, held_out)
    elif path.is_dir() or checkpoint.is_ours(path):
        net, val, description = _trained(path, data, model, size, held_out)
    else:
        net, val, description = _weights(path, data, model, size, held_out)
    if isinstance(val, BoxedImages):
        scored = evaluate_detector(net, val, batch_size=batch_size or 8, device=device, workers=workers)
    else:
        scored = evaluate(net, val, batch_size=batch_size or 256, device=device, workers=workers)
    return scored, description


def _published(
    path: Path, data: str | None, model: str | None, size: int | None, held_out: bool
) -> _Candidate:
    """A folder of `save_pretrained`, whose card has the preprocessing."""
    if model is not None:
        raise ConfigError(f"{path} records its own network: omit --model")
    net, card = hub.from_pretrained(path), hub.card_of(path)
    if data is None and card.data != NAME:
        raise ConfigError(f"{path} does not record where its images are: give DATA, an image folder")
    side = size or card.size
    config = Config("folder", data=data, size=side if data else None, exif=card.exif)
    known = {**card.pictures, "classes": list(card.classes)} if "names" in card.pictures else None
    # The card has no path, so a folder with the name on it also counts as what was trained on.
    own = data is not None and (Path(data).absolute().name == card.data or _holds(config, known))
    val, which = _pictures(config, held_out=held_out or own, trained_on=known if own else None)
    assert not isinstance(val, BoxedImages)
    if not card.classes:
        raise ConfigError(f"{path}: its card does not name the classes, so it cannot be scored")
    _check_classes(val, card.classes, str(path))
    val.mean, val.std = card.mean, card.std
    if card.resize and side == card.size and isinstance(val, Validation):
        val.resized = card.resize
    return net, val, f"{path.resolve().name} on {which}"


def _trained(path: Path, data: str | None, model: str | None, size: int | None, held_out: bool) -> _Candidate:
    state = ours(path)
    began = settings_of(state)
    config = dataclasses.replace(
        began, model=model or began.model, size=size or began.size, data=data or began.data,
        recipe=began.recipe if began.detects else "folder",
    )  # fmt: skip
    if not (own := _is_of_run(config, began, state["data"])):
        config = dataclasses.replace(config, limit=None)  # the limit is for the run's own images
    val, which = _pictures(config, held_out=held_out or own, trained_on=state["data"] if own else None)
    _check_classes(val, state["data"]["classes"], "the run")
    net = network(config, len(val.classes), loaded=True)
    load_trained(net, average_of(state), config.model, path)
    return net, val, f"{config.model} on {which}"


def _weights(path: Path, data: str | None, model: str | None, size: int | None, held_out: bool) -> _Candidate:
    if model is None:
        raise unnamed(path)
    detects = model.partition(":")[0] in DETECTORS
    config = Config(
        "detect/short" if detects else "folder", data=data, model=model, size=size,
        augment="none" if detects else None,
    )  # fmt: skip
    val, which = _pictures(config, held_out=held_out)
    net = network(config, len(val.classes))
    try:
        load_trained(net, path, model, path)
    except OtherClassesError as error:
        here = f"{val.name} has {len(val.classes)}"
        raise error.advising(f"give DATA, with a folder of images for each of them; {here}") from None
    return net, val, f"{model} on {which}"


def _pictures(
    config: Config, *, held_out: bool, trained_on: dict[str, Any] | None = None
) -> tuple[_Set, str]:
    """The images to score, and a description of how many of which folder they are.

    Args:
        held_out: from a folder of classes that we split, take the validation part.
        trained_on: what the run was trained on, if these are its own images.
    """
    whole = None
    if config.data and not config.detects:
        whole = evaluation_set(config.data, size=config.size, exif=config.exif)
    if whole is not None and not held_out:
        return whole, f"all {len(whole)} images of {config.data}"
    train, val = pictures(config)
    if whole is not None:
        # The split follows the order of the file names, so one image more changes it.
        if trained_on is not None and not _same(trained_on, train, val):
            raise ConfigError(
                f"the images in {config.data} have changed since the run began, so which were held out is "
                "no longer known: restore the folder, or score one with another name and none of the run's "
                "images"
            )
        of = f"{len(val)} of the {len(whole)} images of {config.data}"
        return val, f"{of}, the held-out part"
    return val, f"{len(val)} validation images of {val.name}"


def _is_of_run(config: Config, began: Config, data: dict[str, Any]) -> bool:
    """Whether `config` names the images that a run began with, in place or moved."""
    if config.data is None or began.data is None:
        return config.data == began.data
    here, there = Path(config.data), Path(began.data)
    if there.exists() and here.exists() and here.samefile(there):
        return True
    return _holds(config, data)


def _holds(config: Config, data: dict[str, Any] | None) -> bool:
    """Whether the images of `config` are those that `data` describes."""
    try:
        return data is not None and _same(data, *pictures(config))
    except DataError:  # they cannot be split for training, with one image in a class for example
        return False


def _same(data: dict[str, Any], train: _Set, val: _Set) -> bool:
    """Whether a data set is the one a run began with, as far as its checkpoint records."""
    found = about(train, val)
    del found["size"]  # scoring at another size is allowed
    return all(data[name] == value for name, value in found.items() if name in data)


def _check_classes(val: _Set, classes, of: str) -> None:
    if list(val.classes) != list(classes):
        raise ConfigError(f"{val.name} has different classes from {of}: {str(val.classes)[:120]}")
