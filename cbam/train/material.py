"""What a run's settings name: its pictures, its network, its checkpoint."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbam.data import BoxedImages, Images, boxed_folder, cluttered_digits, picture_set
from cbam.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cbam.models import build, freeze_norm
from cbam.train import checkpoint
from cbam.train.detector import begin_with, make_detector
from cbam.train.recipes import Config


def pictures(config: Config) -> tuple[Images, Images] | tuple[BoxedImages, BoxedImages]:
    """The training and the validation set."""
    if config.detects:
        return _boxed(config)
    if config.data is None:
        sets = cluttered_digits()
    else:
        sets = picture_set(config.data, size=config.size, exif=config.exif)
    if config.limit:
        train, val = (images.subset(min(config.limit, len(images))) for images in sets)
        return train, val
    return sets


def _boxed(config: Config) -> tuple[BoxedImages, BoxedImages]:
    if config.data is None:
        raise ConfigError(f"the recipe {config.recipe} needs DATA, a folder of COCO or Pascal VOC")
    train, val = boxed_folder(config.data)
    if config.limit:
        train, val = train.subset(config.limit), val.subset(config.limit)
    return train.augmented(config.augment or "none"), val


def network(config: Config, classes: int, *, loaded: bool = False) -> nn.Module:
    """The network of a run, initialised by its seed; unless it is `loaded` later, with its first weights."""
    start = "identity" if config.pretrained else "paper"
    with torch.random.fork_rng([]):  # it is made on the CPU
        torch.manual_seed(config.seed)
        if config.detects:
            model = make_detector(
                config.model, classes, start=start, size=config.size, regions=config.regions
            )
        else:
            model = build(config.model, num_classes=classes, start=start)
    if config.pretrained and not loaded:
        begin_with(model, config.model, config.pretrained)
    if config.freeze_norm and config.pretrained:  # from scratch there is nothing to keep
        freeze_norm(model)
    return model


def began_with(state: dict[str, Any]) -> Config:
    """The settings that a checkpoint's run began with.

    Raises:
        CheckpointError: some are not known here.
    """
    unknown = [name for name in state["config"] if name not in Config.names()]
    if unknown:
        raise CheckpointError(
            f"the checkpoint has settings that this cbam does not know ({', '.join(unknown)}); upgrade cbam"
        )
    return Config(**state["config"])


def ours(path: Path) -> dict[str, Any]:
    """What a checkpoint of `cbam train` holds, or the newest valid one of a folder."""
    if path.is_dir():
        found = checkpoint.newest(path, lambda _: None)
        if found is None:
            raise CheckpointNotFoundError(f"{path}: no checkpoint in this folder")
        return found[1]
    state = checkpoint.load(path)
    absent = {"config", "data", "model", "seen"} - state.keys()
    if absent:
        raise CheckpointError(f"{path}: not a checkpoint of cbam train, it lacks {', '.join(sorted(absent))}")
    return state
