"""What a run's settings name: its pictures, its network, its checkpoint."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbam.data import Images, cluttered_digits, picture_set
from cbam.errors import CheckpointError, CheckpointNotFoundError
from cbam.models import build
from cbam.surgery import load_weights
from cbam.train import checkpoint
from cbam.train.recipes import Config


def pictures(config: Config) -> tuple[Images, Images]:
    """The training and the validation set."""
    sets = picture_set(config.data, size=config.size) if config.data else cluttered_digits()
    if config.limit:
        train, val = (images.subset(min(config.limit, len(images))) for images in sets)
        return train, val
    return sets


def network(config: Config, classes: int, *, loaded: bool = False) -> nn.Module:
    """The network of a run, initialised by its seed; unless it is `loaded` later, with its first weights."""
    start = "identity" if config.pretrained else "paper"
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = build(config.model, num_classes=classes, start=start)
    if config.pretrained and not loaded:
        _load(model, config.pretrained)
    return model


def _load(model: nn.Module, path: str) -> None:
    """The weights of a file; the last layer stays as it is where it was made for other classes."""
    try:
        load_weights(model, path)
    except CheckpointNotFoundError:
        raise
    except CheckpointError as error:
        try:
            load_weights(model, path, head="reset")
        except CheckpointError:
            raise error from None


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
