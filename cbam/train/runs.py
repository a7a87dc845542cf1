"""A training run in a folder: from its settings to a trained network, resumed as often as needed."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cbam.data import BoxedImages, Images
from cbam.data.parquet import check_output_folder
from cbam.errors import ConfigError
from cbam.train import checkpoint, material
from cbam.train.distributed import World, world
from cbam.train.fitting import fit, lightning, pick_device
from cbam.train.folder import WANDB, check_free, write_config
from cbam.train.lock import is_mine, locked
from cbam.train.loggers import Loggers, ProgressLine
from cbam.train.material import found_at, network, pictures, settings_of
from cbam.train.recipes import (
    FINE_TUNING,
    OVERRIDABLE,
    Config,
    changes,
    fine_tuning_rate,
    full_path,
    recipe,
)
from cbam.train.versions import versions
from cbam.train.watch import Silent, Watch

_Set = Images | BoxedImages


def run(
    name: str,
    settings: dict[str, Any],
    folder: Path,
    watch: Watch,
    *,
    resume: str | None = None,
    max_time: float | None = None,
    override: bool = False,
    began: float | None = None,
) -> list[dict]:
    """Train by the recipe `name`, with `settings` overriding its own; return the metrics of each epoch.

    Everything is written to `folder` (see folder.py). A resumed run keeps its original settings; `settings`
    may change those in `recipes.FREE`, and with `override` also those in `recipes.OVERRIDABLE`. With several
    processes (see distributed.py) each makes the same call; only the first reads, writes and reports.

    Args:
        resume: None for a new run; "auto" for the newest valid checkpoint of `folder`, or a new run if there
            is none; or the path of a checkpoint, or of a run's folder for its newest.
        max_time: seconds after which to save and raise StoppedError, counted from `began`, a time of
            `time.monotonic`; None is now.

    Raises:
        ConfigError: bad or changed settings, or another run in the folder. DataError: bad images.
        CheckpointError: none of the checkpoints is valid. NonFiniteError: the loss is not finite.
        StoppedError: a signal or the time limit. OutputError: the folder cannot be written to.
        OutOfMemoryError. DistributedError: another process is gone.
    """
    began = time.monotonic() if began is None else began
    recipe(name)
    here = world()
    if not here.is_first:
        watch = Silent()
    with contextlib.ExitStack() as stack:
        here.from_first(lambda: _lock(stack, folder, watch) if folder.is_dir() else None)
        state = here.from_first(lambda: _state(folder, resume, watch.say))
        config = _settings(name, settings, state, watch.say, override=override)
        if config.data and not config.detects:
            check_output_folder(config.data, folder)
        if unreached := config.training().unreached():
            watch.say(unreached)
        where = pick_device(config.device)
        train, val = pictures(config)
        if not config.detects:
            config = dataclasses.replace(config, size=train.size if config.data else None)
        data = material.about(train, val)
        about = {"config": dataclasses.asdict(config), "data": data, "versions": versions()}
        if state is not None and (difference := _difference(state["data"], data)):
            raise ConfigError(f"the images are not those of the run: {difference}")
        model = network(config, len(train.classes), loaded=state is not None, say=watch.say)
        with lightning():
            from cbam.train.keeper import Keeper
        here.from_first(lambda: _begin(stack, folder, about["config"], watch))
        for note in dict.fromkeys([*train.notes, *val.notes]):
            watch.say(note)
        watch.now(f"{config.model} on {_described_device(where, here)}, in {folder}")
        if state is None and here.is_first:  # left by a run that died before its first checkpoint
            (folder / WANDB).unlink(missing_ok=True)
        loggers = _loggers(config, folder, watch) if here.is_first else None
        if loggers:
            stack.callback(loggers.close)
        keeper = Keeper(
            folder, about, state=state, save_every=config.save_every, log_every=config.log_every,
            copies=config.keep, max_time=max_time, began=began, say=watch.say, overrides=override,
            loggers=loggers,
        )  # fmt: skip
        return fit(
            model, train, val, config.training(), seed=config.seed, device=config.device,
            workers=config.workers, on_step=_share(config, train, val, state, watch), keeper=keeper,
        )  # fmt: skip


def _lock(stack: contextlib.ExitStack, folder: Path, watch: Watch) -> None:
    stack.enter_context(locked(folder, watch.say))


def _begin(stack: contextlib.ExitStack, folder: Path, config: dict[str, Any], watch: Watch) -> None:
    if not is_mine(folder):  # the folder did not exist before
        _lock(stack, folder, watch)
        if checkpoint.checkpoints(folder):
            raise ConfigError(f"{folder} holds a run that began in the meantime: give another --out")
        check_free(folder)
    write_config(folder, config)


def _described_device(where: torch.device, here: World) -> str:
    if here.size == 1:
        return str(where)
    nodes = here.size // here.local_size
    return f"{here.size} processes on {where}" + (f", {nodes} machines" if nodes > 1 else "")


def _loggers(config: Config, folder: Path, watch: Watch) -> Loggers:
    loggers = Loggers(config.loggers, folder, dataclasses.asdict(config), watch.say)
    loggers.put("progress", ProgressLine(watch.now, config.epochs, every=getattr(watch, "every", 30.0)))
    return loggers


def _state(folder: Path, resume: str | None, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The checkpoint to resume from."""
    check_free(folder)
    there = checkpoint.checkpoints(folder)
    if resume is None:
        if there:
            raise ConfigError(f"{folder} holds a run: --resume auto continues it, or give another --out")
        return None
    if resume == "auto" and not there:
        say(f"no checkpoint in {folder}: starting a new run")
        return None
    source = folder if resume == "auto" else Path(resume)
    path, state = found_at(source, say)
    itself = source.resolve() == folder.resolve()
    if there and not itself and path.resolve() != there[0].resolve():
        raise ConfigError(f"{folder} holds the checkpoint {there[0].name}: give another --out")
    say(f"resuming from {path}: epoch {state['epoch']}, {state['seen']['step']} steps of it done")
    return state


def _settings(
    name: str,
    given: dict[str, Any],
    state: dict | None,
    say: Callable[[str], None],
    *,
    override: bool,
) -> Config:
    given = {**given, **_device_counts(given)}
    for path in ("data", "pretrained"):
        if given.get(path):
            given[path] = full_path(given[path])
    if state is None:
        if rate := fine_tuning_rate(name, given):
            say(f"learning rate {rate:g}, a tenth of the recipe's, as the weights are pretrained (see --lr)")
            given["lr"] = rate
        config = dataclasses.replace(recipe(name), **given).settled()
        if config.data is None and config.recipe != "digits" and not config.detects:
            raise ConfigError(f"the recipe {name} needs DATA, an image folder")
        _refuse_idle(recipe(name), config)
        if name == FINE_TUNING and not config.pretrained:
            raise ConfigError(f"the recipe {name} needs --pretrained FILE, the weights to start from")
        return config
    before = settings_of(state)
    config = dataclasses.replace(before, **{**given, "recipe": name})
    refused, allowed = changes(dataclasses.asdict(before), dataclasses.asdict(config), override=override)
    if refused:
        raise ConfigError(
            f"the run began with other settings: {'; '.join(refused)}; leave them out to continue it, "
            f"or give another --out for a new run{_hint(refused)}"
        )
    begun = state["epoch"] + (state["seen"]["step"] > 0)
    if config.epochs < begun:
        raise ConfigError(f"epochs is {config.epochs}, but {begun} have begun already: give {begun} or more")
    _refuse_idle(before, config)
    for line in allowed:
        say(f"changed: {line}")
    return config


def _refuse_idle(before: Config, config: Config) -> None:
    """Refuse settings that differ from `before` but have no effect together with the others."""
    reasons = {}
    if config.schedule != "step":
        reasons |= dict.fromkeys(
            ("step_epochs", "milestones"), f"is for --schedule step, not {config.schedule}"
        )
    if config.optimizer != "sgd":
        reasons["momentum"] = f"is for --optimizer sgd, not {config.optimizer}"
    if "+" not in config.model:
        reasons["start"] = f"is for added attention, and {config.model} has none (NAME+cbam adds it)"
    idle = [name for name in reasons if getattr(config, name) != getattr(before, name)]
    if idle:
        raise ConfigError("; ".join(f"{name} {reasons[name]}" for name in idle))


def _hint(refused: list[str]) -> str:
    could = all(line.split()[0] in OVERRIDABLE for line in refused)
    return ", or --override to continue with the new ones" if could else ""


def _device_counts(given: dict[str, Any]) -> dict[str, int]:
    """The actual numbers of devices and nodes."""
    here = world()
    found = {"devices": here.local_size, "nodes": here.size // here.local_size}
    for name, count in found.items():
        if given.get(name, count) != count:
            raise ConfigError(f"{name} is {given[name]}, but {count} was started; see docs/training.md")
    return found


def _difference(before: dict, now: dict) -> str:
    """The difference in words; older checkpoints record neither the file names nor the objects."""
    other = [name for name in now if name in before and before[name] != now[name]]
    shown = [f"{n} {str(before[n])[:80]} -> {str(now[n])[:80]}" for n in other if n not in _DIGESTS]
    return "; ".join(shown or [_DIGESTS[name] for name in other])


_DIGESTS = {
    "names": "as many, but some with other names",
    "training objects": "different boxes or labels in the training images",
    "validation objects": "different boxes or labels in the validation images",
}


def _share(config: Config, train: _Set, val: _Set, state: dict | None, watch: Watch):
    whole = config.epochs * (3 * len(train) + len(val))
    if state is not None:
        seen = min(state["seen"]["step"] * config.batch_size, len(train))
        watch.skip((state["epoch"] * (3 * len(train) + len(val)) + 3 * seen) / whole)
    return lambda work: watch.advance(work / whole)
