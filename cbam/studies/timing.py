"""Times of several programs, one after the other in every round: machines drift, neighbours do not."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

WARM_UP = 3
Step = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timed:
    """Milliseconds of one program, a number per round; `ratios` to the first of its peers, round by round."""

    ms: list[float]
    ratios: list[float]

    @property
    def median(self) -> float:
        """The median milliseconds."""
        return statistics.median(self.ms)

    @property
    def ratio(self) -> float:
        """The median ratio."""
        return statistics.median(self.ratios)


def in_turns(
    steps: Mapping[Name, Step],
    device: torch.device,
    *,
    rounds: int = 11,
    seconds: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, Timed]:
    """Time every step once per round; each other round runs them in the opposite order.

    A round repeats a step that is shorter than two milliseconds on a GPU, whose clock is coarse, or than
    twenty on a CPU, which others interrupt. After `seconds` no further round begins, but five there are.
    `clock` tells what a step takes, in seconds.
    """
    repeats = {}
    for name, step in steps.items():
        for _ in range(WARM_UP):
            _once(step, 1, device, clock)
        least = 2 if _is_gpu(device) else 20
        repeats[name] = max(1, min(100, int(least / max(_once(step, 1, device, clock), 1e-3))))
    found: dict[Name, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= 5 and time.perf_counter() - began > seconds:
            break
        for name in list(steps)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(_once(steps[name], repeats[name], device, clock))
    first = found[next(iter(steps))]
    return {name: Timed(ms, [a / b for a, b in zip(ms, first, strict=True)]) for name, ms in found.items()}


def _once(step: Step, repeats: int, device: torch.device, clock: Callable[[], float]) -> float:
    if _is_gpu(device):
        torch.cuda.synchronize(device)
    began = clock()
    for _ in range(repeats):
        step()
    if _is_gpu(device):
        torch.cuda.synchronize(device)
    return 1e3 * (clock() - began) / repeats


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
