"""Times of several programs, run in turn in every round, so that drift of the machine cancels in ratios."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

WARM_UP = 3
LAUNCHES = 20  # per graph, to amortise the launch of the graph
NETWORK = 250.0  # `least` for whole networks: five steps of 45 ms, enough to resolve one per cent
Step = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timed:
    """Milliseconds of one program, one number per round; `ratios` are to the first program, per round."""

    ms: list[float]
    ratios: list[float]

    @property
    def median(self) -> float:
        """The median time in milliseconds."""
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
    least: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, Timed]:
    """Time every step once per round; every second round runs them in reverse order.

    Within a round a step is repeated until it takes about `least` milliseconds on a GPU, as the host's clock
    needs, or 20 ms on a CPU, where other processes interrupt. After `seconds` no further round begins, but at
    least five run. `clock` returns the time in seconds.
    """
    repeats = {}
    for name, step in steps.items():
        for _ in range(WARM_UP):
            _once(step, 1, device, clock)
        enough = least if _is_gpu(device) else 20
        repeats[name] = max(1, min(100, int(enough / max(_once(step, 1, device, clock), 1e-3))))
    found: dict[Name, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= 5 and time.perf_counter() - began > seconds:
            break
        for name in list(steps)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(_once(steps[name], repeats[name], device, clock))
    first = found[next(iter(steps))]
    return {name: Timed(ms, [a / b for a, b in zip(ms, first, strict=True)]) for name, ms in found.items()}


def device_only(
    steps: Mapping[Name, Step], device: torch.device, *, rounds: int = 11, seconds: float = 60.0
) -> dict[Name, Timed]:
    """As `in_turns`, without launch overhead: kernels under about 20 us end before the next one is launched.

    A step is timed as a CUDA graph of LAUNCHES repeats; on a CPU it runs as it is.
    """
    times = LAUNCHES if _is_gpu(device) else 1
    graphs = {name: captured(step, device, times) for name, step in steps.items()}
    timed = in_turns(graphs, device, rounds=rounds, seconds=seconds)
    return {name: Timed([ms / times for ms in found.ms], found.ratios) for name, found in timed.items()}


def captured(step: Step, device: torch.device, times: int = 1) -> Step:
    """`step`, repeated `times` times, as one CUDA graph with a single launch; on a CPU, as plain calls."""

    def repeat() -> list[object]:
        return [step() for _ in range(times)]

    if not _is_gpu(device):
        return repeat
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = repeat()

    def replay() -> object:
        graph.replay()
        # The graph only holds addresses: what it reads and writes must live as long as this closure.
        return step, results

    return replay


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
