"""What differs between kinds of training; the steps are the same for all (steps.py)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Part(NamedTuple):
    """Which part of a step a batch is.

    Args:
        count: how many of its images count: the first ones.
        samples: images of the whole step, of all its parts.
        parts: in how many parts the step is taken.
        key: numbers that no other batch of the run has, to draw by.
    """

    count: int
    samples: int
    parts: int
    key: tuple[int, ...]

    @property
    def weight(self) -> float:
        """What to multiply a mean over this part by: the mean over all parts is that over the step then."""
        return self.count * self.parts / self.samples


class Task(Protocol):
    """What a network is trained for. Batches are dicts with "index" (N,), what else is the task's affair."""

    model: nn.Module

    def loss(self, network: Callable[..., Any], batch: dict, part: Part) -> tuple[Tensor, Tensor]:
        """The loss of a part, weighted for its step; and a number that is summed over the epoch.

        `network` is the model, perhaps compiled.
        """
        ...

    def trained(self, tally: float) -> dict[str, float]:
        """Metrics of an epoch of training, from the mean of that number over its images.

        Of an epoch of which no step was taken they are None.
        """
        ...

    def output(self, batch: dict) -> Any:
        """What is kept of a batch of validation, on the CPU; the model is in eval mode."""
        ...

    def collected(self, outputs: list[Any]) -> Any:
        """The outputs of a validation, those of all processes, by index."""
        ...

    def scores(self, collected: Any) -> dict[str, float | None]:
        """Metrics of a validation. All processes come here."""
        ...


def told(entry: Mapping[str, Any]) -> str:
    """The metrics of a validation for a reader."""
    if "val_top1" in entry:
        return f"validation loss {entry['val_loss']:.4f}, top-1 error {entry['val_top1']:.2f} %"
    return f"AP50 {percent(entry['val_ap50'])}, AP {percent(entry['val_ap'])}"


def percent(value: float | None) -> str:
    """A metric in % for a reader; "-" for None, where there was nothing to measure it on."""
    return "-" if value is None else f"{value:.2f} %"


def is_epoch(entry: Mapping[str, Any]) -> bool:
    """Whether metrics are those of an epoch, not of a step; loggers are not given what is None."""
    return "train_loss" in entry or "wait_seconds" in entry
