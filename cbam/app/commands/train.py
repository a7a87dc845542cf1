"""`cbam train`."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from cbam.app.options import Parser, add_setting, duration, given, need, terminable
from cbam.app.terminal import progress, show
from cbam.errors import ConfigError
from cbam.train.launch import launch, place
from cbam.train.recipes import RECIPES, Config, recipe

HELP = "train a network by a recipe; an interrupted run can be resumed"
RUNS = "cbam-runs"
EXTRAS = {"train": ("torchvision", "PIL", "sklearn", "pytorch_lightning")}


def add(parser: Parser) -> None:
    """Add the options: the recipe, the fields of Config, the run folder, and how to resume."""
    parser.add_argument("recipe", metavar="RECIPE", help=f"one of {', '.join(RECIPES)}")
    for field in dataclasses.fields(Config):
        if field.name != "recipe":
            add_setting(parser, field, of_recipe=True)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the options above, such as the config.json of a run",
    )
    parser.add_argument("--out", metavar="DIR", help=f"folder of the run (default: {RUNS}/RECIPE)")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: continue from the newest valid checkpoint in --out, if there is one; PATH: from this "
        "checkpoint or run",
    )
    parser.add_argument(
        "--override",
        action="store_true",
        help="let a resumed run change the epochs, learning rate, schedule, momentum, weight decay, label "
        "smoothing, mixing and --nonfinite",
    )
    parser.add_argument(
        "--max-time",
        type=duration,
        metavar="TIME",
        help="save and exit with code 75 before this time is over: 90m, 11.5h, 11:30:00",
    )


def run(options: argparse.Namespace) -> int:
    """Train, and print the metrics of the last epoch."""
    began = time.monotonic()  # --max-time includes imports, waiting and reading the data
    settings = given(options, Config)
    settings.pop("recipe", None)
    recipe(options.recipe)
    need("cbam train", EXTRAS)
    if (processes := to_start(settings)) > 1:
        return launch(options.argv, processes)
    from cbam.train import run
    from cbam.train.distributed import joined

    folder, here = _folder(options), place()
    quiet = here is not None and here.rank > 0
    with terminable(), progress(quiet=quiet) as watch, joined(here, cuda=uses_cuda(settings)):
        history = run(
            options.recipe, settings, folder, watch, resume=options.resume, max_time=options.max_time,
            override=options.override, began=began,
        )  # fmt: skip
    last = history[-1]
    if not quiet:
        from cbam.train.task import summary

        show(f"Done: {summary(last)}; in {folder}")
    return 0


def to_start(settings: dict[str, Any]) -> int:
    """The number of processes to start; 1 if this is already one of several."""
    if place() is not None:
        return 1
    if settings.get("nodes", 1) > 1:
        raise ConfigError(
            "on several machines, start the command with torchrun (on each) or srun; see docs/training.md"
        )
    return settings.get("devices", 1)


def uses_cuda(settings: dict[str, Any]) -> bool:
    """Whether the processes use a GPU each."""
    from cbam.train import pick_device

    return pick_device(settings.get("device", "auto")).type == "cuda"


def _folder(options: argparse.Namespace) -> Path:
    if options.out is not None:
        return Path(options.out)
    if options.resume not in (None, "auto"):
        path = Path(options.resume)
        return path if path.is_dir() else path.parent
    return Path(RUNS) / options.recipe.replace("/", "-")
