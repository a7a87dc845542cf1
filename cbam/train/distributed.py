"""Several processes that train one network: joining them, agreeing, and naming the one that is gone.

What they agree on goes over gloo and the CPU, also on GPUs: there a lost peer is an exception, where NCCL
would end the process. Gradients go over NCCL.
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
ROLL_CALL = 1.5  # seconds to answer whether one is there
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, one of `local_size` on its machine."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """The sums of these numbers over all processes, equal on all of them to the last bit."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all(self, value: T) -> list[T]:
        """What each process has, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` returns, or raises, in the first process; the others wait for it."""
        if self.size == 1:
            return function()
        said: list[Any] = [None]
        if self.is_first:
            try:
                said = [(function(), None)]
            except (CBAMError, FloatingPointError) as error:
                said = [(None, error)]
        dist.broadcast_object_list(said, 0)
        value, error = said[0]
        if error is not None:
            raise error
        return value

    def joined(self, part: Tensor) -> Tensor:
        """The parts of all processes, which may be of different lengths, one after the other."""
        if self.size == 1:
            return part
        lengths = self.all(len(part))
        padded = part.new_zeros(max(lengths), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, lengths, strict=True)])

    def spread(self, tensors: list[Tensor]) -> None:
        """Give every process the first one's `tensors`, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


_here = World()


def world() -> World:
    """The world of this process: the one that it joined, or itself alone."""
    return _here


@contextlib.contextmanager
def joined(place: Place | None, *, cuda: bool = False, timeout: float = TIMEOUT) -> Iterator[World]:
    """Meet the other processes, and part from them at the end.

    An error of any process ends all of them: in the others it is a DistributedError that names it. The error
    is told once: in every process but one, `silent` is set on it.

    Args:
        place: None for a process of its own.
        cuda: whether every process has a GPU.
        timeout: seconds after which a process that does not answer is taken for hung.
    """
    global _here
    if place is None or place.size == 1:
        yield World()
        return
    die_with_parent()
    if place.local_size == place.size:  # one machine: neither a network nor its name is needed
        name = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    store, patience = _meet(place, timeout), datetime.timedelta(seconds=timeout)
    call = _RollCall(store, place)
    _here = World(place.rank, place.size, place.local_size)
    try:
        gpu = _take_gpu(place) if cuda else None
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=patience
        )
        if gpu is not None:
            _check_apart(_here.all(gpu))
        yield _here
    except BaseException as error:
        told = call.told(error)
        raise told from (None if told is error else error)
    finally:
        _here = World()
        if dist.is_initialized() and not (cuda and sys.exc_info()[0]):  # NCCL would wait for the dead
            dist.destroy_process_group()


def _take_gpu(place: Place) -> str:
    """Make this process's GPU the current one, and return what it is known by everywhere.

    It is the one of the process's number on this machine, or the only one that it sees: srun can show each
    process another (`--gpus-per-task 1`).
    """
    there = torch.cuda.device_count()
    if max(place.local_size, place.local_rank + 1) > there > 1:
        raise ConfigError(
            f"{place.local_size} processes on this machine need a GPU each, and a process sees {there} here: "
            f"start {there}, let each process see all GPUs or its own alone, or take --device cpu"
        )
    number = place.local_rank if there > 1 else 0
    torch.cuda.set_device(number)
    return str(torch.cuda.get_device_properties(number).uuid)


def _check_apart(gpus: list[str]) -> None:
    """Refuse processes that share a GPU: they would wait for each other, and NCCL for both."""
    for rank, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) < rank:
            raise ConfigError(
                f"processes {first} and {rank} have one and the same GPU ({gpu}), and need one each: "
                f"start {len(set(gpus))}, let each see all GPUs or its own alone, or take --device cpu"
            )


def _meet(place: Place, timeout: float) -> dist.Store:
    """A store for this attempt alone: torchrun restarts processes, and the keys of the dead stay."""
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
        told = f"process {place.rank} cannot reach the others at {address}: {_line(error)}"
        raise DistributedError(told) from error


def _attempt(store: dist.Store, place: Place, patience: datetime.timedelta) -> int:
    """The number of this attempt. The first process begins one; the others take the newest not taken by a
    process of their rank before."""
    if place.rank == 0:
        return store.add("cbam/attempts", 1)
    deadline = time.monotonic() + patience.total_seconds()
    while time.monotonic() < deadline:
        attempt = store.add("cbam/attempts", 0)
        if attempt > 0 and store.add(f"cbam/{attempt}/taken/{place.rank}", 1) == 1:
            return attempt
        time.sleep(0.1)
    raise DistributedError(f"process {place.rank} waited {patience.total_seconds():g} s for the first one")


class _RollCall:
    """Says who is gone when one is, and sees to it that an error is told once."""

    def __init__(self, store: dist.Store, place: Place) -> None:
        self._store, self._place = store, place
        store.set(f"who/{place.rank}", f"{socket.gethostname()}:{os.getpid()}")

    def told(self, error: BaseException) -> BaseException:
        """`error`, or what became of another process where that is why it was raised; perhaps `silent`."""
        try:
            if is_of_a_peer(error):
                error = DistributedError(self._missing(error))
            else:
                self._store.set(f"left/{self._place.rank}", _line(error))
            first = self._store.add("told", 1) == 1
            if isinstance(error, StoppedError | NonFiniteError):  # all come to it, and the first knows most
                first = self._place.rank == 0
            error.silent = not first  # type: ignore[attr-defined]
        except (dist.DistError, RuntimeError):  # the store was in a process that is gone
            error = DistributedError("process 0, where all processes meet, is gone")
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
            said = self._store.get(f"left/{left[0]}").decode()
            return f"{self._who(left[0])} stopped: {said}"
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
        """Host and process number; empty for one that never started, whose key would be waited for."""
        if not self._store.check([f"who/{rank}"]):
            return "", ""
        host, _, pid = self._store.get(f"who/{rank}").decode().rpartition(":")
        return host, pid

    def _dump_stacks(self, absent: list[int]) -> None:
        """Let those of this machine that do not answer say on stderr where they are."""
        for rank in absent:
            host, pid = self._place_of(rank)
            if host == socket.gethostname() and hasattr(signal, "SIGUSR1"):
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGUSR1)


def is_of_a_peer(error: BaseException) -> bool:
    """Whether an error is what a process sees of the end of another."""
    if isinstance(error, CBAMError):
        return False
    if isinstance(error, dist.DistError):
        return True
    signs = (
        *("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer"),
        *("Wait timeout", "Timeout waiting for key"),  # a FileStore's, of one that does not come
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
