"""Copying the scalars of a step to the CPU without stalling a GPU, and undoing a step's forward pass."""

from typing import Any

import torch
from torch import Tensor, nn


class Pending:
    """Scalars on their way to the CPU, while a GPU continues with the backward pass."""

    def __init__(self, *scalars: Tensor) -> None:
        numbers = torch.stack([scalar.detach().double() for scalar in scalars])
        self._event = None
        if numbers.is_cuda:
            self._numbers = torch.empty(len(scalars), dtype=torch.float64, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._numbers = numbers

    def numbers(self) -> list[float]:
        """The scalars, after waiting for them to arrive."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


class Snapshot:
    """A snapshot of what the forward pass of a step changes: BatchNorm's statistics and the random state."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._saved = model, []
        self._rng: dict[str, Any] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Take the snapshot."""
        live = self._live()
        if [(t.device, t.dtype) for t in self._saved] != [(t.device, t.dtype) for t in live]:
            self._saved = [tensor.clone() for tensor in live]
        else:
            _copy(self._saved, live)
        self._rng = rng()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the snapshot."""
        _copy(self._live(), self._saved)
        set_rng(self._rng)

    def _live(self) -> list[Tensor]:
        return list(self._model.buffers())


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for kind in {tensor.dtype for tensor in to}:  # a GPU copies all tensors of one dtype in one launch
        pairs = [(a, b) for a, b in zip(to, source, strict=True) if a.dtype == kind]
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])


def rng() -> dict[str, Any]:
    """The random state of this process, on the CPU and its GPU."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_rng(states: dict[str, Any]) -> None:
    """Restore such a state; that of a GPU only if there is one."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state(states["cuda"][0])
