"""Training and evaluation on Lightning's Trainer: network, data and recipe -> trained network, metrics."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbam.train.fitting import Detections, Evaluation, evaluate, evaluate_detector, fit, pick_device
    from cbam.train.recipe import Recipe
    from cbam.train.recipes import RECIPES, Config
    from cbam.train.runs import run
    from cbam.train.scoring import score

# Imported on first use: the command line reads the recipes for its help, which must not wait for torch.
_HOME = {
    **dict.fromkeys(
        ("Detections", "Evaluation", "evaluate", "evaluate_detector", "fit", "pick_device"), "fitting"
    ),
    **dict.fromkeys(("Config", "RECIPES"), "recipes"),
    "run": "runs",
    "score": "scoring",
    "Recipe": "recipe",
}

__all__ = [
    "RECIPES",
    "Config",
    "Detections",
    "Evaluation",
    "Recipe",
    "evaluate",
    "evaluate_detector",
    "fit",
    "pick_device",
    "run",
    "score",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'cbam.train' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cbam.train.{_HOME[name]}"), name)
    globals()[name] = value
    return value
