"""The interface of a training task; the training steps are the same for all tasks (steps.py)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Part(NamedTuple):
    """The part of a step that a batch makes up.

    Args:
        count: how many of its images count; those after them are padding.
        samples: images in the whole step, over all its parts.
        parts: the number of parts of the step.
        key: numbers unique to this batch in the run, to seed random draws.
    """

    count: int
    samples: int
    parts: int
    key: tuple[int, ...]

    @property
    def weight(self) -> float:
        """The factor for a mean over this part, so that the mean over the parts is that over the step."""
        return self.count * self.parts / self.samples


class Task(Protocol):
    """What a network is trained for. Batches are dicts with "index" (N,); the rest is up to the task."""

    model: nn.Module

    def loss(self, network: Callable[..., Any], batch: dict, part: Part) -> tuple[Tensor, Tensor]:
        """The loss of a part, weighted for its step; and a number that is summed over the epoch.

        `network` is the model, possibly compiled.
        """
        ...

    def trained(self, tally: float) -> dict[str, float]:
        """Metrics of an epoch of training, from the mean of that number over its images.

        For an epoch without a single step they are None.
        """
        ...

    def output(self, batch: dict) -> Any:
        """What to keep of a validation batch, on the CPU; the model is in eval mode."""
        ...

    def collected(self, outputs: list[Any]) -> Any:
        """The outputs of a validation from all processes, by index."""
        ...

    def scores(self, collected: Any) -> dict[str, float | None]:
        """Metrics of a validation. All processes call this."""
        ...


def summary(entry: Mapping[str, Any]) -> str:
    """The metrics of a validation as text."""
    if "val_top1" in entry:
        return f"validation loss {entry['val_loss']:.4f}, top-1 error {entry['val_top1']:.2f} %"
    return f"AP50 {percent(entry['val_ap50'])}, AP {percent(entry['val_ap'])}"


def percent(value: float | None) -> str:
    """A metric in % as text; "-" for None, if there was nothing to measure it on."""
    return "-" if value is None else f"{value:.2f} %"


def is_epoch(entry: Mapping[str, Any]) -> bool:
    """Whether metrics are those of an epoch, not of a step; loggers do not get `train_loss` if it is None."""
    return "train_loss" in entry or "wait_seconds" in entry
