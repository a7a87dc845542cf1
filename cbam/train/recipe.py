"""The hyperparameters of a training. Imports no torch."""

import math
from dataclasses import dataclass

from cbam.errors import ConfigError

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "step", "constant")
PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
NONFINITE = ("stop", "skip")


@dataclass(frozen=True)
class Recipe:
    """The settings of one training; all invalid ones are reported together.

    Args:
        epochs: passes over the training images.
        batch_size: images per step, on all devices together; for the last step see `cbam.data.loader`.
        optimizer: "sgd" (with `momentum`) or "adamw".
        lr: the peak learning rate.
        weight_decay: on every parameter, as in the paper; with `decay_matrices_only` not on biases and norms.
        schedule: "cosine" (half a cosine down to zero over the run, arXiv 1608.03983), "step" (the
            paper's: divided by 10 every `step_epochs` epochs, or after each of `milestones`) or "constant".
        warmup_epochs: over which the learning rate first rises linearly (arXiv 1706.02677).
        attention_lr: the learning rate of attached attention, as a multiple of that of the network.
        label_smoothing: share of the target that is spread over all classes (arXiv 1512.00567).
        mixup, cutmix: the parameter of the Beta distribution that the share of the second image is drawn
            from (arXiv 1710.09412, 1905.04899); 0 for none, and with both each batch draws one.
        ema: decay per step of the average of the weights that is evaluated, 0 for none.
        precision: "fp32"; "bf16" or "fp16" by autocast, with fp32 weights; "fp64" for tests.
        accumulate: number of batches that each step is computed in, one after the other, to save memory.
        compile: run the network through torch.compile.
        sync_bn: BatchNorm over the batches of all devices (GPUs only).
        nonfinite: no step is taken with a non-finite loss; "stop" then ends the training, "skip" continues,
            at most 10 times in a row.
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    step_epochs: int = 30
    milestones: tuple[int, ...] = ()
    warmup_epochs: float = 0.0
    attention_lr: float = 1.0
    decay_matrices_only: bool = False
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    precision: str = "fp32"
    accumulate: int = 1
    compile: bool = False
    sync_bn: bool = False
    nonfinite: str = "stop"

    def __post_init__(self) -> None:
        problems = [text for good, text in self._rules() if not good]
        if problems:
            raise ConfigError("bad recipe: " + "; ".join(problems))

    def _rules(self):
        for name in ("epochs", "batch_size", "step_epochs", "accumulate"):
            value = getattr(self, name)
            yield _is_count(value), f"{name} must be a positive int, got {value!r}"
        for name, low, high in _RANGES:
            value = getattr(self, name)
            good = _is_number(value) and low <= value < high
            yield good, f"{name} must be a finite number from {low} to below {high}, got {value!r}"
        for name, known in _CHOICES:
            value = getattr(self, name)
            yield value in known, f"{name} must be one of {', '.join(known)}, got {value!r}"
        for name in ("decay_matrices_only", "compile", "sync_bn"):
            value = getattr(self, name)
            yield isinstance(value, bool), f"{name} must be true or false, got {value!r}"
        marks = self.milestones
        rising = isinstance(marks, tuple) and all(map(_is_count, marks)) and list(marks) == sorted(set(marks))
        yield rising, f"milestones must be increasing numbers of epochs, got {marks!r}"
        if _is_count(self.batch_size) and _is_count(self.accumulate):
            good = self.batch_size % self.accumulate == 0
            yield good, f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}"

    def unreached(self) -> str:
        """The part of the schedule that lies beyond the last epoch, in words; a short trial may have one."""
        marks = self.milestones or (self.step_epochs,)
        late = [mark for mark in marks if mark >= self.epochs]
        parts = []
        if self.warmup_epochs >= self.epochs:
            parts.append(f"warmup_epochs is {self.warmup_epochs:g}, so the learning rate rises to the end")
        if self.schedule == "step" and late:
            name = "milestones" if self.milestones else "step_epochs"
            parts.append(f"the learning rate is not lowered at {name} {' '.join(map(str, late))}")
        return f"epochs is {self.epochs}: {'; '.join(parts)}" if parts else ""

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step (counted from 0 over the whole run), as a fraction of `lr`."""
        warm = self.warmup_epochs * steps_per_epoch
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step" and self.milestones:
            return 0.1 ** sum(step >= steps_per_epoch * mark for mark in self.milestones)
        if self.schedule == "step":
            return 0.1 ** (step // (steps_per_epoch * self.step_epochs))
        whole = max(1.0, steps_per_epoch * self.epochs - warm)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / whole)))


_RANGES = (
    ("lr", 0, math.inf), ("momentum", 0, 1), ("weight_decay", 0, math.inf), ("warmup_epochs", 0, math.inf),
    ("attention_lr", 0, math.inf), ("label_smoothing", 0, 1), ("mixup", 0, math.inf), ("cutmix", 0, math.inf),
    ("ema", 0, 1),
)  # fmt: skip
_CHOICES = (
    ("optimizer", OPTIMIZERS),
    ("schedule", SCHEDULES),
    ("precision", PRECISIONS),
    ("nonfinite", NONFINITE),
)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
