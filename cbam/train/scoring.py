"""How a checkpoint, or a file of weights, does on the pictures that validate."""

import dataclasses
from pathlib import Path

from cbam.data import BoxedImages
from cbam.errors import CheckpointNotFoundError, ConfigError
from cbam.models.detectors import DETECTORS
from cbam.surgery import load_weights
from cbam.train import checkpoint
from cbam.train.average import average_of
from cbam.train.fitting import Detections, Evaluation, evaluate, evaluate_detector, pick_device
from cbam.train.material import began_with, network, ours, pictures
from cbam.train.recipes import Config


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
        path: of a checkpoint, of a run's folder (its newest valid one), or of a weights file.
        data: image folder, whose validation pictures are taken, for a detector one of COCO or Pascal VOC;
            None: what the run was trained on, or the digits.
        model: the network of a weights file; a checkpoint knows its own.
        size: side of the pictures; a checkpoint knows its own.
        batch_size: None for 256, of a detector 8.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `checkpoint.load` and `load_weights`.
        ConfigError: no model is named, or the classes are not the checkpoint's.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: no such file")
    pick_device(device)
    if path.is_dir() or checkpoint.step_of(path) >= 0:
        state = ours(path)
        began = began_with(state)
        config = dataclasses.replace(
            began, model=model or began.model, size=size or began.size, data=data or began.data,
            recipe=began.recipe if began.detects else "folder",
        )  # fmt: skip
        _, val = pictures(config)
        if val.classes != state["data"]["classes"]:
            raise ConfigError(f"{val.name} has other classes than the run: {str(val.classes)[:120]}")
        net = network(config, len(val.classes), loaded=True)
        load_weights(net, average_of(state))
    else:
        if model is None:
            raise ConfigError(f"{path} does not say what network it is: give --model NAME, see `cbam list`")
        detects = model.partition(":")[0] in DETECTORS
        config = Config(
            "detect/short" if detects else "folder", data=data, model=model, size=size,
            augment="none" if detects else None,
        )  # fmt: skip
        _, val = pictures(config)
        net = network(config, len(val.classes))
        load_weights(net, path)
    if isinstance(val, BoxedImages):
        scored = evaluate_detector(net, val, batch_size=batch_size or 8, device=device, workers=workers)
    else:
        scored = evaluate(net, val, batch_size=batch_size or 256, device=device, workers=workers)
    return scored, f"{config.model} on {len(val)} validation pictures of {val.name}"
