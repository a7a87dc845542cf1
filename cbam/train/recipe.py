"""How a network is trained: the numbers, and nothing that knows a framework."""

import math
from dataclasses import dataclass

from cbam.errors import ConfigError

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "step", "constant")


@dataclass(frozen=True)
class Recipe:
    """The settings of one training; all problems of a bad one are reported together.

    Args:
        epochs: passes over the training images.
        batch_size: images per step; the last, smaller batch of an epoch is the loader's affair.
        optimizer: "sgd" (with `momentum`) or "adamw". Weight decay is on every parameter, as in the paper.
        lr: the highest learning rate.
        schedule: "cosine" (half a cosine down to zero over the run, arXiv 1608.03983), "step" (the
            paper's: divided by 10 every `step_epochs` epochs) or "constant".
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    step_epochs: int = 30

    def __post_init__(self) -> None:
        problems = [text for good, text in self._rules() if not good]
        if problems:
            raise ConfigError("bad recipe: " + "; ".join(problems))

    def _rules(self):
        for name in ("epochs", "batch_size", "step_epochs"):
            value = getattr(self, name)
            yield _is_count(value), f"{name} must be a positive int, got {value!r}"
        for name, low, high in (("lr", 0, math.inf), ("momentum", 0, 1), ("weight_decay", 0, math.inf)):
            value = getattr(self, name)
            good = _is_number(value) and low <= value < high
            yield good, f"{name} must be a finite number from {low} to below {high}, got {value!r}"
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            yield value in known, f"{name} must be one of {', '.join(known)}, got {value!r}"

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step (counted from 0 over the whole run) as a share of `lr`."""
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return 0.1 ** (step // (steps_per_epoch * self.step_epochs))
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / (steps_per_epoch * self.epochs))))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
