"""A run in a folder: from the settings to a trained network, resumed as often as it takes; and its score."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cbam.data import Images, cluttered_digits, image_folder
from cbam.errors import CheckpointError, CheckpointNotFoundError, ConfigError, MissingExtraError
from cbam.models import build
from cbam.surgery import load_weights
from cbam.train import checkpoint
from cbam.train.fitting import Evaluation, evaluate, fit, pick_device
from cbam.train.folder import locked, write_config
from cbam.train.recipes import Config, changes, full_path, recipe


class Watch(Protocol):
    """What is told how a run goes."""

    def say(self, line: str) -> None:
        """A line for the user."""

    def now(self, what: str) -> None:
        """What is running."""

    def advance(self, share: float) -> None:
        """This share of the whole is done."""


def run(
    name: str,
    settings: dict[str, Any],
    folder: Path,
    watch: Watch,
    *,
    resume: str | None = None,
    max_time: float | None = None,
) -> list[dict]:
    """Train by the recipe `name`, with `settings` in place of its own; metrics per epoch.

    Everything goes to `folder`: see folder.py. A resumed run takes the settings it began with; `settings`
    may change those of `recipes.FREE` alone.

    Args:
        resume: None for a new run; "auto" for the newest valid checkpoint of `folder`, or a new run where
            there is none; or the path of a checkpoint.
        max_time: seconds after which to save and raise StoppedError.

    Raises:
        ConfigError: bad settings, a run in the folder, changed settings. DataError: bad pictures.
        CheckpointError: none of the checkpoints is valid. NonFiniteError: the loss is not finite.
        StoppedError: a signal or the time limit. OutputError: the folder cannot be written to.
    """
    recipe(name)
    with contextlib.ExitStack() as stack:
        if folder.is_dir():
            stack.enter_context(locked(folder))
        state = _state(folder, resume, watch.say)
        config = _settings(name, settings, state, watch.say)
        where = pick_device(config.device)
        train, val = _pictures(config)
        config = dataclasses.replace(config, size=train.size if config.data else None)
        about = {"config": dataclasses.asdict(config), "data": _about(train, val)}
        if state is not None and state.get("data") != about["data"]:
            raise ConfigError(
                f"the pictures are not those of the run: {_difference(state['data'], about['data'])}"
            )
        model = network(config, len(train.classes))
        keeper_class = _keeper_class()
        if not folder.is_dir():
            stack.enter_context(locked(folder))
        write_config(folder, about["config"])
        for note in dict.fromkeys([*train.notes, *val.notes]):
            watch.say(note)
        watch.now(f"{config.model} on {where}, in {folder}")
        keeper = keeper_class(
            folder, about, state=state, save_every=config.save_every, log_every=config.log_every,
            copies=config.keep, max_time=max_time, say=watch.say,
        )  # fmt: skip
        return fit(
            model, train, val, config.training(), seed=config.seed, device=config.device,
            workers=config.workers, on_step=_share(config, train, val, state, watch), keeper=keeper,
        )  # fmt: skip


def _keeper_class():
    try:
        from cbam.train.keeper import Keeper
    except ImportError as error:
        if error.name and error.name.startswith("cbam"):
            raise
        raise MissingExtraError.of("training", "train") from error
    return Keeper


def _state(folder: Path, resume: str | None, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The checkpoint to go on from."""
    there = checkpoint.checkpoints(folder)
    if resume is None:
        if there:
            raise ConfigError(f"{folder} holds a run: --resume auto goes on with it, or give another --out")
        return None
    if resume == "auto":
        found = checkpoint.newest(folder, say)
        if found is None:
            say(f"no checkpoint in {folder}: a new run")
            return None
        path, state = found
    else:
        path = Path(resume)
        state = _ours(path)
        if there and path.absolute() != there[0].absolute():
            raise ConfigError(f"{folder} holds the checkpoint {there[0].name}: give another --out")
    say(f"going on from {path}: epoch {state['epoch']}, {state['seen']['step']} steps of it done")
    return state


def _ours(path: Path) -> dict[str, Any]:
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


def _settings(name: str, given: dict[str, Any], state: dict | None, say: Callable[[str], None]) -> Config:
    if given.get("data"):
        given = {**given, "data": full_path(given["data"])}
    if state is None:
        config = dataclasses.replace(recipe(name), **given)
        if config.data is None and config.recipe != "digits":
            raise ConfigError(f"the recipe {name} needs DATA, an image folder")
        return config
    before = state["config"]
    now = {**before, **given, "recipe": name}
    refused, allowed = changes(before, now)
    if refused:
        raise ConfigError(
            f"the run began with other settings: {'; '.join(refused)}; leave them out to go on with it, "
            "or give another --out for a new run"
        )
    for line in allowed:
        say(f"changed: {line}")
    return Config(**now)


def _pictures(config: Config) -> tuple[Images, Images]:
    sets = image_folder(config.data, size=config.size) if config.data else cluttered_digits()
    if config.limit:
        train, val = (images.subset(min(config.limit, len(images))) for images in sets)
        return train, val
    return sets


def _about(train: Images, val: Images) -> dict[str, Any]:
    """What tells one data set from another, wherever it lies."""
    return {"classes": train.classes, "training": len(train), "validation": len(val), "size": train.size}


def _difference(before: dict, now: dict) -> str:
    return "; ".join(
        f"{name} {str(before[name])[:80]} -> {str(now[name])[:80]}"
        for name in now
        if before[name] != now[name]
    )


def network(config: Config, classes: int) -> nn.Module:
    """The network of a run, initialised by its seed."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return build(config.model, num_classes=classes)


def _share(config: Config, train: Images, val: Images, state: dict | None, watch: Watch):
    whole = config.epochs * (3 * len(train) + len(val))
    if state is not None:
        seen = min(state["seen"]["step"] * config.batch_size, len(train))
        watch.advance((state["epoch"] * (3 * len(train) + len(val)) + 3 * seen) / whole)
    return lambda work: watch.advance(work / whole)


def score(
    path: Path,
    *,
    data: str | None = None,
    model: str | None = None,
    size: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 0,
) -> tuple[Evaluation, str]:
    """Evaluate a checkpoint of `run`, or the weights of a named network; and say on what.

    Args:
        path: of a checkpoint, of a run's folder (its newest valid one), or of a weights file.
        data: image folder, whose validation pictures are taken; None: what the run was trained on, or the
            digits.
        model: the network of a weights file; a checkpoint knows its own.
        size: side of the pictures; a checkpoint knows its own.

    Raises:
        CheckpointNotFoundError, CheckpointError: as `checkpoint.load` and `load_weights`.
        ConfigError: no model is named, or the classes are not the checkpoint's.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: no such file")
    pick_device(device)
    if path.is_dir() or checkpoint.step_of(path) >= 0:
        state = _ours(path)
        began = Config(**state["config"])
        config = dataclasses.replace(
            began, model=model or began.model, size=size or began.size, recipe="folder",
            data=data or began.data,
        )  # fmt: skip
        _, val = _pictures(config)
        if val.classes != state["data"]["classes"]:
            raise ConfigError(f"{val.name} has other classes than the run: {str(val.classes)[:120]}")
        net = network(config, len(val.classes))
        load_weights(net, state["model"])
    else:
        if model is None:
            raise ConfigError(f"{path} does not say what network it is: give --model NAME, see `cbam list`")
        config = Config("folder", data=data, model=model, size=size)
        _, val = _pictures(config)
        net = network(config, len(val.classes))
        load_weights(net, path)
    scored = evaluate(net, val, batch_size=batch_size, device=device, workers=workers)
    return scored, f"{config.model} on {len(val)} validation pictures of {val.name}"
