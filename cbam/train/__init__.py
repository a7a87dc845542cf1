"""A network, a data set and a recipe -> a trained network and its metrics, on Lightning's Trainer."""

from cbam.train.fit import Evaluation, evaluate, fit, pick_device
from cbam.train.recipe import Recipe

__all__ = ["Evaluation", "Recipe", "evaluate", "fit", "pick_device"]
