"""Evaluation of a checkpoint, a published folder or a weights file on the validation images."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from cbam import hub
from cbam.data import BoxedImages, Images
from cbam.data.digits import NAME
from cbam.data.parquet import unsplit_set
from cbam.data.pictures import Validation
from cbam.errors import CheckpointNotFoundError, ConfigError, DataError, OtherClassesError
from cbam.models.detectors import DETECTORS
from cbam.train import checkpoint
from cbam.train.average import average_of
from cbam.train.fitting import Detections, Evaluation, evaluate, evaluate_detector, pick_device
from cbam.train.material import about, began_with, load_trained, network, ours, pictures, unnamed
from cbam.train.recipes import Config

_Set = Images | BoxedImages
_Candidate = tuple[nn.Module, _Set, str]  # the network, its images, and in words both


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
    """Evaluate a checkpoint of `run`, or the weights of a named network; and say on what.

    Of a run that averages its weights it is the average.

    Args:
        path: of a checkpoint, of a run's folder (its newest valid one), of a folder of `save_pretrained`, or
            of a weights file.
        data: image folder, for a detector one of COCO or Pascal VOC; None: what the run was trained on, or
            the digits. Its validation images are taken. Of a folder of classes that has none apart all are,
            but of the one that the run was trained on only those that were held out.
        model: the network of a weights file; a checkpoint and a published folder know their own.
        size: side of the images; a checkpoint and a published folder know their own.
        batch_size: None for 256, of a detector 8.
        held_out: of any folder of classes that has no validation images apart, take those that a training
            on it holds out.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `checkpoint.load`, `from_pretrained` and `load_weights`.
        ConfigError: no model is named, the classes are not the network's, or images of a run that held
            some of them out have come or gone.
        NonFiniteError: the network gives NaN.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: no such file")
    pick_device(device)
    if hub.is_published(path):
        net, val, told = _published(path, data, model, size, held_out)
    elif path.is_dir() or checkpoint.is_ours(path):
        net, val, told = _trained(path, data, model, size, held_out)
    else:
        net, val, told = _weights(path, data, model, size, held_out)
    if isinstance(val, BoxedImages):
        scored = evaluate_detector(net, val, batch_size=batch_size or 8, device=device, workers=workers)
    else:
        scored = evaluate(net, val, batch_size=batch_size or 256, device=device, workers=workers)
    return scored, told


def _published(
    path: Path, data: str | None, model: str | None, size: int | None, held_out: bool
) -> _Candidate:
    """A folder of `save_pretrained`: its card says how images come to it."""
    if model is not None:
        raise ConfigError(f"{path} says what network it is: leave --model out")
    net, card = hub.from_pretrained(path), hub.card_of(path)
    if data is None and card.data != NAME:
        raise ConfigError(f"{path} knows no images here: give DATA, a folder of them")
    side = size or card.size
    config = Config("folder", data=data, size=side if data else None, exif=card.exif)
    known = {**card.pictures, "classes": list(card.classes)} if "names" in card.pictures else None
    # The card has no path, so a folder of the name that it gives is taken for what was trained on, too.
    own = data is not None and (Path(data).absolute().name == card.data or _holds(config, known))
    val, which = _pictures(config, held_out=held_out or own, began_with=known if own else None)
    assert not isinstance(val, BoxedImages)
    if not card.classes:
        raise ConfigError(f"{path}: its card does not name the classes, so its answers cannot be judged")
    _check_classes(val, card.classes, str(path))
    val.mean, val.std = card.mean, card.std
    if card.resize and side == card.size and isinstance(val, Validation):
        val.resized = card.resize
    return net, val, f"{path.resolve().name} on {which}"


def _trained(path: Path, data: str | None, model: str | None, size: int | None, held_out: bool) -> _Candidate:
    state = ours(path)
    began = began_with(state)
    config = dataclasses.replace(
        began, model=model or began.model, size=size or began.size, data=data or began.data,
        recipe=began.recipe if began.detects else "folder",
    )  # fmt: skip
    if not (own := _is_of_run(config, began, state["data"])):
        config = dataclasses.replace(config, limit=None)  # it says how much of its own images a run takes
    val, which = _pictures(config, held_out=held_out or own, began_with=state["data"] if own else None)
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
        here = f"there are {len(val.classes)} in {val.name}"
        raise error.advising(f"give DATA, images in a folder for each of them; {here}") from None
    return net, val, f"{model} on {which}"


def _pictures(
    config: Config, *, held_out: bool, began_with: dict[str, Any] | None = None
) -> tuple[_Set, str]:
    """The images to be scored, and in words how many of which folder they are.

    Args:
        held_out: of a folder of classes that is split by us, take the part that validates.
        began_with: what the run was trained on, where these are its own images.
    """
    whole = None
    if config.data and not config.detects:
        whole = unsplit_set(config.data, size=config.size, exif=config.exif)
    if whole is not None and not held_out:
        return whole, f"all {len(whole)} images of {config.data}"
    train, val = pictures(config)
    if whole is not None:
        # The split is by the order of the names: with an image more it is another.
        if began_with is not None and not _same(began_with, train, val):
            raise ConfigError(
                f"{config.data} has other images than when the run began, so which were held out is no "
                "longer known: score a folder with none of the run's images and of another name, or put "
                "this one back as it was"
            )
        of = f"{len(val)} of the {len(whole)} images of {config.data}"
        return val, f"{of}, held out when it is trained on"
    return val, f"{len(val)} validation images of {val.name}"


def _is_of_run(config: Config, began: Config, data: dict[str, Any]) -> bool:
    """Whether the images that `config` names are those that a run began with: the same, or moved."""
    if config.data is None or began.data is None:
        return config.data == began.data
    here, there = Path(config.data), Path(began.data)
    if there.exists() and here.exists() and here.samefile(there):
        return True
    return _holds(config, data)


def _holds(config: Config, data: dict[str, Any] | None) -> bool:
    """Whether the images of `config` are those that `data` tells of."""
    try:
        return data is not None and _same(data, *pictures(config))
    except DataError:  # they cannot be trained on, with one image in a class for example
        return False


def _same(data: dict[str, Any], train: _Set, val: _Set) -> bool:
    """Whether a data set is what a run began with, as far as its checkpoint says."""
    found = about(train, val)
    del found["size"]  # it may be scored in another one
    return all(data[name] == value for name, value in found.items() if name in data)


def _check_classes(val: _Set, classes, of: str) -> None:
    if list(val.classes) != list(classes):
        raise ConfigError(f"{val.name} has other classes than {of}: {str(val.classes)[:120]}")
