"""Batches of a set of images, for one process or for each of several.

Where a sample comes in an epoch is a function of (seed, epoch, index), and of nothing else: a step of N
images is the same N images however many processes, and however many parts of a step, share them.
"""

import ctypes
import itertools
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cbam.data.boxes import BoxedImages
from cbam.data.images import MAX_SEED, Images, check_int, draws
from cbam.errors import DataError, InputError

PATIENCE = 300.0  # seconds that a process may take for a batch
_AHEAD = 16  # results that a process brings at once
_POLL = 1.0  # seconds after which it is looked whether the processes are alive
# Workers share the list of the images with the process that forks them; from Python 3.14 each would import
# torch and get a copy of it.
_START = "fork" if sys.platform.startswith("linux") else None
_RAISED = f"{DataError.__module__}.{DataError.__name__}: "
_Key = tuple[int, int]

_log = logging.getLogger("cbam")


@dataclass(frozen=True)
class Shard:
    """Which part of every step is this process's: `rank` of `world`, in `accumulate` batches one by one.

    A step is cut into world x accumulate equal parts. Where its images, the last of an epoch, do not fill
    them, a part is filled up with images that do not count; `share` says how many do.
    """

    rank: int = 0
    world: int = 1
    accumulate: int = 1

    @property
    def parts(self) -> int:
        """Number of parts of a step."""
        return self.world * self.accumulate

    def part(self, step: list[_Key], number: int, least: int = 1) -> list[_Key]:
        """Batch `number` (below `accumulate`) of this process in a step of these samples, `least` or more."""
        size = -(-len(step) // self.parts)
        first = (number * self.world + self.rank) * size
        own = step[first : first + size]
        return own + step[:1] * (max(size, least) - len(own))

    def share(self, samples: int, number: int) -> int:
        """How many of the samples in `part(step, number)` count, in a step of `samples`."""
        size = -(-samples // self.parts)
        return min(size, max(0, samples - (number * self.world + self.rank) * size))


ALONE = Shard()


class EpochSampler(Sampler[_Key]):
    """Yields (epoch, index) for every index once: in an order that (seed, epoch) makes, or in plain order.

    In plain order the epoch is always 0, so that an evaluation sees the same samples each time; there
    `shard` takes every world-th index.
    """

    def __init__(self, length: int, *, shuffle: bool, seed: int = 0, shard: Shard = ALONE) -> None:
        self.length, self.shuffle, self.seed, self.epoch = length, shuffle, seed, 0
        self.plain = range(length)[shard.rank :: shard.world]
        self._seen = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; Lightning's Trainer does."""
        self.epoch = epoch

    def resume(self, epoch: int, samples: int) -> None:
        """Go on in `epoch`: its first `samples` have been seen, and are neither yielded nor counted."""
        self.epoch, self._seen = epoch, (epoch, samples)

    def _start(self) -> int:
        epoch, samples = self._seen
        return samples if epoch == self.epoch else 0

    def __iter__(self) -> Iterator[_Key]:
        if not self.shuffle:
            return iter([(0, index) for index in self.plain])
        order = draws("order", self.seed, self.epoch).permutation(self.length).tolist()
        return iter([(self.epoch, index) for index in order[self._start() :]])

    def __len__(self) -> int:
        return self.length - self._start() if self.shuffle else len(self.plain)


class Batches(Sampler[list[_Key]]):
    """The batches of one process: steps of `size` samples out of `sampler`, and of each the part of `shard`.

    A last training step of one sample is left out, unless it is the only one.
    """

    skip = 0  # batches that iterations leave out at their beginning

    def __init__(self, sampler: EpochSampler, size: int, shard: Shard) -> None:
        self.sampler, self.size, self.shard = sampler, size, shard
        self._leaves_one = sampler.shuffle and sampler.length > size and sampler.length % size == 1

    def __iter__(self) -> Iterator[list[_Key]]:
        return itertools.islice(self._all(), self.skip, None)

    def _all(self) -> Iterator[list[_Key]]:
        keys = list(self.sampler)
        for first in range(0, self.steps() * self.size, self.size):
            step = keys[first : first + self.size]
            # Of a single sample BatchNorm takes no variance where its map has one pixel.
            least = 2 if self.shard.parts > 1 and 1 < len(step) < self.size else 1
            for number in range(self.shard.accumulate):
                yield self.shard.part(step, number, least) if self.sampler.shuffle else step

    def steps(self) -> int:
        """Steps that an iteration has from here: fewer in an epoch that is resumed."""
        return -(-len(self.sampler) // self.size) - self._leaves_one

    def __len__(self) -> int:
        return self.steps() * (self.shard.accumulate if self.sampler.shuffle else 1)


class _Loader(DataLoader):
    """A DataLoader that outlives a worker's death once an epoch, and tells a DataError as it was raised."""

    batch_sampler: Batches

    def __init__(self, images: Dataset, batches: Batches, *, patience: float, **how: Any) -> None:
        if how["num_workers"]:
            how |= {"timeout": _POLL, "multiprocessing_context": _START}
        super().__init__(images, batch_sampler=batches, **how)
        object.__setattr__(self, "sampler", batches.sampler)  # a DataLoader lets nobody set it
        self._patience = patience

    def __iter__(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        done, self._deaths = 0, 0
        while True:
            self.batch_sampler.skip = done
            try:
                batches = self._started()
            except OSError as error:
                raise _exhausted(error) or error from None
            finally:
                self.batch_sampler.skip = 0
            try:
                while True:
                    batch = self._next(batches, done)
                    done += 1
                    yield batch
            except StopIteration:
                return
            except DataError as error:
                self._end(batches)
                lines = [line for line in str(error).splitlines() if line.startswith(_RAISED)]
                raise DataError(lines[-1].removeprefix(_RAISED) if lines else str(error)) from None
            except RuntimeError as error:
                self._restart(batches, error)

    def _started(self):
        """An iterator; without torch's handler, which raises the death of a worker at any line of a step."""
        if not self.num_workers or threading.current_thread() is not threading.main_thread():
            return super().__iter__()
        before = signal.getsignal(signal.SIGCHLD)
        batches = super().__iter__()
        signal.signal(signal.SIGCHLD, before)
        return batches

    def _next(self, batches, done: int):
        began = time.monotonic()
        while True:
            try:
                return next(batches)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                if time.monotonic() - began > self._patience:
                    raise DataError(self._hung(batches, done)) from None
            except (OSError, EOFError) as error:  # it died with a batch in its hands
                if not self.num_workers:
                    raise
                raise RuntimeError(f"DataLoader worker ended early: {error}") from error

    def _hung(self, batches, done: int) -> str:
        worker = batches._task_info[batches._rcvd_idx][0]
        pictures = [index for _, index in next(itertools.islice(self.batch_sampler, done, None), [])]
        told = ", ".join(map(str, pictures[:8])) + (", ..." if len(pictures) > 8 else "")
        return (
            f"process {batches._workers[worker].pid} (loader worker {worker}) brought nothing for "
            f"{self._patience:g} s; it was reading the images {told}"
        )

    def _restart(self, batches, error: RuntimeError) -> None:
        if self.num_workers and (told := _exhausted(error)):
            self._end(batches)
            raise told from None
        if not self.num_workers or "DataLoader worker" not in str(error):
            raise error
        self._end(batches)
        self._deaths += 1
        if self._deaths > 1:
            raise DataError(f"a process that loads images died, for the second time: {error}") from error
        _log.warning("a process that loads images died and is started anew: %s", error)

    def end(self) -> None:
        """End the workers, if there are any."""
        if self._iterator is not None:
            self._end(self._iterator)

    def _end(self, batches) -> None:
        """End the workers now: the garbage collector would wait seconds, for a stopped one for ever."""
        if self.num_workers:
            for worker in batches._workers:
                worker.kill()
            batches._shutdown_workers()
            self._iterator = None


def _exhausted(error: Exception) -> DataError | None:
    """What the workers ran out of, in our words; None of any other error."""
    text = str(error)
    if "Too many open files" in text:
        return DataError("too many open files: raise the limit (ulimit -n 65536), or take fewer --workers")
    # By signal, by the first batch that does not fit, by a semaphore that does not.
    if any(
        sign in text for sign in ("out of shared memory", "shared memory(shm)", "No space left on device")
    ):
        return DataError(
            "no room in /dev/shm, through which the loader's processes hand over their batches: "
            "give it more (docker run --shm-size 8g), or take fewer --workers"
        )
    return None


def _end_with_parent(worker: int) -> None:
    """Let this worker be killed with the process that it loads for (Linux).

    It would notice by itself after seconds, in which it keeps that process's connections to others open.
    """
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class _Results(Dataset):
    """What `function` returns for each of these, by (epoch, number)."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: _Key) -> Any:
        return self.function(self.items[key[1]])


def in_order(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """What `function` returns for each of these, in their order; `workers` are processes that go ahead.

    Raises:
        DataError: what it raises; a process that died again or brings nothing.
    """
    if workers == 0 or not items:
        yield from map(function, items)
        return
    batches = Batches(EpochSampler(len(items), shuffle=False), _AHEAD, ALONE)
    results = _Loader(
        _Results(function, items),
        batches,
        patience=PATIENCE,
        collate_fn=list,
        num_workers=workers,
        worker_init_fn=_end_with_parent,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(0),
    )
    try:
        for batch in results:
            yield from batch
    finally:
        results.end()


def loader(
    images: Images | BoxedImages,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    workers: int = 0,
    shard: Shard = ALONE,
    pinned: bool = False,
    patience: float = PATIENCE,
) -> DataLoader:
    """Batches of `images` as dicts: image uint8 (N, 3, S, S), target (N,), index (N,), box (N, 4).
    Those of images with boxes are as `BoxedImages.collate` says.

    For training the order and the random choices are functions of (seed, epoch, index); call
    `loader.sampler.set_epoch(epoch)` before each epoch, as Lightning does. Every sample comes once in an
    epoch. One exception: a last training batch of a single sample is left out, for BatchNorm cannot
    train on it (that sample differs from epoch to epoch).

    Args:
        batch_size: samples per step of all processes together, of which each gets N; for evaluation, N.
        train: shuffled if true; in plain order, always as in epoch 0, if false.
        workers: processes that read ahead, for speed alone. Once in an epoch, one that dies is replaced.
        shard: the part of this process.
        pinned: in memory that a GPU reads by itself while the processor goes on; takes a usable GPU.
        patience: seconds that a worker may take for a batch.

    Raises:
        InputError: the samples of a step cannot be shared evenly.
        DataError: no samples; while it runs: a bad image, a worker that died again or brings nothing.
    """
    batch_size = check_int("batch_size", batch_size, 1, MAX_SEED)
    workers = check_int("workers", workers, 0, 1024)
    seed = check_int("seed", seed, 0, MAX_SEED)
    if len(images) == 0:
        raise DataError(f"{images.name} has no samples")
    if train and batch_size % shard.parts:
        raise InputError(
            f"batch_size {batch_size} cannot be shared evenly by {shard.world} processes of "
            f"{shard.accumulate} batches each; take a multiple of {shard.parts}"
        )
    images = images.seeded(seed) if train else images
    sampler = EpochSampler(len(images), shuffle=train, seed=seed, shard=shard)
    batches = Batches(sampler, batch_size, shard)
    own = images.loaded(batches)
    if own is not None:
        return own
    return _Loader(
        images,
        batches,
        patience=patience,
        collate_fn=images.collate,
        num_workers=workers,
        worker_init_fn=_end_with_parent if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pinned,
        # Its own, for the workers' seeds, which nothing uses: the caller's generator is left alone.
        generator=torch.Generator().manual_seed(seed),
    )
