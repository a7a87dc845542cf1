"""Several processes that train one network: connecting them, agreeing, and naming one that is gone.

They agree over gloo on the CPU even when training on GPUs: with gloo a lost peer raises an exception, whereas
NCCL would end the process. Gradients go over NCCL.
"""

import contextlib
import datetime
import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cbam.errors import CBAMError, ConfigError, DistributedError, NonFiniteError, StoppedError
from cbam.train.launch import Place, die_with_parent

TIMEOUT = 600.0  # seconds that the others wait for a process
ROLL_CALL = 1.5  # seconds in which a process must answer the roll call
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, one of `local_size` on its machine."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """The sums of these numbers over all processes, bitwise equal on all of them."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all(self, value: T) -> list[T]:
        """The value of each process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, function: Callable[[], T]) -> T:
        """Run `function` in the first process only; return its result, or raise its error, in all."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None]
        if self.is_first:
            try:
                outcome = [(function(), None)]
            except (CBAMError, FloatingPointError) as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome, 0)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def concatenated(self, part: Tensor) -> Tensor:
        """Concatenate the parts of all processes, which may differ in length."""
        if self.size == 1:
            return part
        lengths = self.all(len(part))
        padded = part.new_zeros(max(lengths), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, lengths, strict=True)])

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Overwrite `tensors` in every process with those of the first."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


_here = World()


def world() -> World:
    """The world that this process has joined, or a world of its own."""
    return _here


@contextlib.contextmanager
def joined(place: Place | None, *, cuda: bool = False, timeout: float = TIMEOUT) -> Iterator[World]:
    """Connect to the other processes, and disconnect at the end.

    An error in any process ends all of them: in the others it is a DistributedError that names the process.
    The error is reported once: in every process but one it has `silent` set.

    Args:
        place: None for a single process.
        cuda: whether every process has a GPU.
        timeout: seconds after which a process that does not answer counts as hung.
    """
    global _here
    if place is None or place.size == 1:
        yield World()
        return
    die_with_parent()
    if place.local_size == place.size:  # one machine: works without a network or a resolvable host name
        name = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    store, patience = _open_store(place, timeout), datetime.timedelta(seconds=timeout)
    roll_call = _RollCall(store, place)
    _here = World(place.rank, place.size, place.local_size)
    try:
        gpu = _set_gpu(place) if cuda else None
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=patience
        )
        if gpu is not None:
            _check_distinct(_here.all(gpu))
        yield _here
    except BaseException as error:
        reported = roll_call.report(error)
        raise reported from (None if reported is error else error)
    finally:
        _here = World()
        if dist.is_initialized() and not (cuda and sys.exc_info()[0]):  # NCCL would wait for a dead peer
            dist.destroy_process_group()


def _set_gpu(place: Place) -> str:
    """Make this process's GPU the current one, and return its UUID.

    It is the one of the local rank, or the only one that the process sees: srun can show each process a
    different one (`--gpus-per-task 1`).
    """
    there = torch.cuda.device_count()
    if max(place.local_size, place.local_rank + 1) > there > 1:
        raise ConfigError(
            f"{place.local_size} processes on this machine need a GPU each, but a process sees {there} here: "
            f"start {there}, let each process see all GPUs or only its own, or use --device cpu"
        )
    number = place.local_rank if there > 1 else 0
    torch.cuda.set_device(number)
    return str(torch.cuda.get_device_properties(number).uuid)


def _check_distinct(gpus: list[str]) -> None:
    """Refuse processes that share a GPU: they would wait for each other, and NCCL would hang."""
    for rank, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) < rank:
            raise ConfigError(
                f"processes {first} and {rank} have the same GPU ({gpu}), but need one each: "
                f"start {len(set(gpus))}, let each see all GPUs or only its own, or use --device cpu"
            )


def _open_store(place: Place, timeout: float) -> dist.Store:
    """A store for this attempt only: torchrun restarts processes, and the keys of dead ones remain."""
    kind, _, address = place.store.partition(":")
    patience = datetime.timedelta(seconds=min(timeout, 300))
    try:
        if kind == "file":
            return dist.FileStore(address, place.size)
        host, _, port = address.rpartition(":")
        first = kind == "tcp" and place.rank == 0
        store = dist.TCPStore(
            host, int(port), None, first, patience, wait_for_workers=False, multi_tenant=True
        )
        return dist.PrefixStore(f"cbam/{_attempt(store, place, patience)}", store)
    except (dist.DistError, RuntimeError, ValueError) as error:
        message = f"process {place.rank} cannot reach the others at {address}: {_line(error)}"
        raise DistributedError(message) from error


def _attempt(store: dist.Store, place: Place, patience: datetime.timedelta) -> int:
    """The number of this attempt. Rank 0 starts a new one; the others join the newest that no earlier
    process of their rank has joined."""
    if place.rank == 0:
        return store.add("cbam/attempts", 1)
    deadline = time.monotonic() + patience.total_seconds()
    while time.monotonic() < deadline:
        attempt = store.add("cbam/attempts", 0)
        if attempt > 0 and store.add(f"cbam/{attempt}/taken/{place.rank}", 1) == 1:
            return attempt
        time.sleep(0.1)
    raise DistributedError(f"process {place.rank} waited {patience.total_seconds():g} s for process 0")


class _RollCall:
    """Finds out which process is gone, and makes sure that an error is reported only once."""

    def __init__(self, store: dist.Store, place: Place) -> None:
        self._store, self._place = store, place
        store.set(f"who/{place.rank}", f"{socket.gethostname()}:{os.getpid()}")

    def report(self, error: BaseException) -> BaseException:
        """`error`, or a DistributedError if another process caused it; `silent` if another reports it."""
        try:
            if is_peer_error(error):
                error = DistributedError(self._missing(error))
            else:
                self._store.set(f"left/{self._place.rank}", _line(error))
            first = self._store.add("reported", 1) == 1
            if isinstance(error, StoppedError | NonFiniteError):  # raised in all; the first has the details
                first = self._place.rank == 0
            error.silent = not first  # type: ignore[attr-defined]
        except (dist.DistError, RuntimeError):  # the store is gone with its process
            error = DistributedError("process 0, which connects all processes, is gone")
            error.silent = self._place.rank > 1  # type: ignore[attr-defined]
        return error

    def _missing(self, error: BaseException) -> str:
        self._store.set(f"here/{self._place.rank}", "")
        others = [rank for rank in range(self._place.size) if rank != self._place.rank]
        deadline = time.monotonic() + ROLL_CALL
        while True:
            left = [r for r in others if self._store.check([f"left/{r}"])]
            absent = [r for r in others if r not in left and not self._store.check([f"here/{r}"])]
            if left or not absent or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if left:
            reason = self._store.get(f"left/{left[0]}").decode()
            return f"{self._who(left[0])} stopped: {reason}"
        hung = "imed out" in str(error) or "imeout" in str(error)
        if hung:
            traceback.print_exception(error)  # where this process waited
            self._dump_stacks(absent)
        names = ", ".join(self._who(rank) for rank in absent) or "a process"
        return f"{names} {'does not answer' if hung else 'is gone'} ({_line(error)[:200]})"

    def _who(self, rank: int) -> str:
        host, pid = self._place_of(rank)
        return f"process {rank} (pid {pid} on {host})" if pid else f"process {rank}, which never started,"

    def _place_of(self, rank: int) -> tuple[str, str]:
        """Host and process id; empty for a process that never started, as get() would wait for its key."""
        if not self._store.check([f"who/{rank}"]):
            return "", ""
        host, _, pid = self._store.get(f"who/{rank}").decode().rpartition(":")
        return host, pid

    def _dump_stacks(self, absent: list[int]) -> None:
        """Make unresponsive processes on this machine print their stacks to stderr."""
        for rank in absent:
            host, pid = self._place_of(rank)
            if host == socket.gethostname() and hasattr(signal, "SIGUSR1"):
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGUSR1)


def is_peer_error(error: BaseException) -> bool:
    """Whether an error was caused by the end of another process."""
    if isinstance(error, CBAMError):
        return False
    if isinstance(error, dist.DistError):
        return True
    signs = (
        *("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer"),
        *("Wait timeout", "Timeout waiting for key"),  # from a FileStore, if a process never joins
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
