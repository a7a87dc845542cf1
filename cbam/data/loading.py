"""Batches of a set of images, for one process or several.

The position of a sample in an epoch depends only on (seed, epoch, index): a step of N images has the same N
images, no matter how many processes and accumulated batches share it.
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

PATIENCE = 300.0  # seconds that a worker may take for a batch
_CHUNK = 16  # results that a worker returns at once
_POLL = 1.0  # seconds between checks that the workers are alive
# Forked workers share the list of images. Python 3.14's default start method would import torch in each, and
# copy the list.
_START_METHOD = "fork" if sys.platform.startswith("linux") else None
_RAISED = f"{DataError.__module__}.{DataError.__name__}: "
_Key = tuple[int, int]

_log = logging.getLogger("cbam")


@dataclass(frozen=True)
class Shard:
    """The part of every step that belongs to process `rank` of `world`, in `accumulate` successive batches.

    A step is divided into world x accumulate equal parts. If the last images of an epoch do not fill them,
    parts are padded with images that do not count; `share` gives the number that do.
    """

    rank: int = 0
    world: int = 1
    accumulate: int = 1

    @property
    def parts(self) -> int:
        """Number of parts of a step."""
        return self.world * self.accumulate

    def part(self, step: list[_Key], number: int, least: int = 1) -> list[_Key]:
        """Batch `number` (< `accumulate`) of this process in a step, padded to `least` samples or more."""
        size = -(-len(step) // self.parts)
        first = (number * self.world + self.rank) * size
        own = step[first : first + size]
        return own + step[:1] * (max(size, least) - len(own))

    def share(self, samples: int, number: int) -> int:
        """Number of samples in `part(step, number)` that count, for a step of `samples`."""
        size = -(-samples // self.parts)
        return min(size, max(0, samples - (number * self.world + self.rank) * size))


ALONE = Shard()


class EpochSampler(Sampler[_Key]):
    """Yields (epoch, index) once for every index: shuffled by (seed, epoch), or in sequential order.

    In sequential order the epoch is always 0, so that every evaluation sees the same samples, and `shard`
    takes every world-th index.
    """

    def __init__(self, length: int, *, shuffle: bool, seed: int = 0, shard: Shard = ALONE) -> None:
        self.length, self.shuffle, self.seed, self.epoch = length, shuffle, seed, 0
        self.plain = range(length)[shard.rank :: shard.world]
        self._seen = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; Lightning's Trainer calls this."""
        self.epoch = epoch

    def resume(self, epoch: int, samples: int) -> None:
        """Resume in `epoch`: its first `samples` have been seen, and are neither yielded nor counted."""
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
    """The batches of one process: from each step of `size` samples, the part of `shard`.

    A last training step of one sample is left out, unless it is the only one.
    """

    skip = 0  # batches that an iteration skips at its start

    def __init__(self, sampler: EpochSampler, size: int, shard: Shard) -> None:
        self.sampler, self.size, self.shard = sampler, size, shard
        self._leaves_one = sampler.shuffle and sampler.length > size and sampler.length % size == 1

    def __iter__(self) -> Iterator[list[_Key]]:
        return itertools.islice(self._all(), self.skip, None)

    def _all(self) -> Iterator[list[_Key]]:
        keys = list(self.sampler)
        for first in range(0, self.steps() * self.size, self.size):
            step = keys[first : first + self.size]
            # BatchNorm cannot train on a single value: one sample whose feature map has one pixel.
            least = 2 if self.shard.parts > 1 and 1 < len(step) < self.size else 1
            for number in range(self.shard.accumulate):
                yield self.shard.part(step, number, least) if self.sampler.shuffle else step

    def steps(self) -> int:
        """Number of steps in the next iteration: fewer in a resumed epoch."""
        return -(-len(self.sampler) // self.size) - self._leaves_one

    def __len__(self) -> int:
        return self.steps() * (self.shard.accumulate if self.sampler.shuffle else 1)


class _Loader(DataLoader):
    """A DataLoader that survives the death of one worker per epoch, and raises a worker's DataError as is."""

    batch_sampler: Batches

    def __init__(self, images: Dataset, batches: Batches, *, patience: float, **options: Any) -> None:
        if options["num_workers"]:
            options |= {"timeout": _POLL, "multiprocessing_context": _START_METHOD}
        super().__init__(images, batch_sampler=batches, **options)
        object.__setattr__(self, "sampler", batches.sampler)  # DataLoader forbids setting it
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
        """Start iterating, without torch's SIGCHLD handler, which would raise at any line of a step."""
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
            except (OSError, EOFError) as error:  # it died while sending a batch
                if not self.num_workers:
                    raise
                raise RuntimeError(f"DataLoader worker ended early: {error}") from error

    def _hung(self, batches, done: int) -> str:
        worker = batches._task_info[batches._rcvd_idx][0]
        pictures = [index for _, index in next(itertools.islice(self.batch_sampler, done, None), [])]
        indices = ", ".join(map(str, pictures[:8])) + (", ..." if len(pictures) > 8 else "")
        return (
            f"process {batches._workers[worker].pid} (loader worker {worker}) delivered nothing for "
            f"{self._patience:g} s; it was reading the images {indices}"
        )

    def _restart(self, batches, error: RuntimeError) -> None:
        if self.num_workers and (exhausted := _exhausted(error)):
            self._end(batches)
            raise exhausted from None
        if not self.num_workers or "DataLoader worker" not in str(error):
            raise error
        self._end(batches)
        self._deaths += 1
        if self._deaths > 1:
            raise DataError(f"a process that loads images died for the second time: {error}") from error
        _log.warning("a process that loads images died and is restarted: %s", error)

    def end(self) -> None:
        """End the workers, if there are any."""
        if self._iterator is not None:
            self._end(self._iterator)

    def _end(self, batches) -> None:
        """End the workers now: the garbage collector would wait seconds, or forever for a stopped one."""
        if self.num_workers:
            for worker in batches._workers:
                worker.kill()
            batches._shutdown_workers()
            self._iterator = None


def _exhausted(error: Exception) -> DataError | None:
    """The error to raise if the workers ran out of files or shared memory; None for any other error."""
    text = str(error)
    if "Too many open files" in text:
        return DataError("too many open files: raise the limit (ulimit -n 65536), or use fewer --workers")
    # Reported by a signal, by the first batch that does not fit, or by a semaphore that does not.
    if any(
        sign in text for sign in ("out of shared memory", "shared memory(shm)", "No space left on device")
    ):
        return DataError(
            "no space in /dev/shm, through which the loader's processes pass their batches: "
            "enlarge it (docker run --shm-size 8g), or use fewer --workers"
        )
    return None


def _end_with_parent(worker: int) -> None:
    """Have the kernel kill this worker together with its parent process (Linux).

    It would notice only after seconds, and meanwhile keep its parent's connections open.
    """
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class _Results(Dataset):
    """The results of `function` for each item, by (epoch, index)."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: _Key) -> Any:
        return self.function(self.items[key[1]])


def in_order(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """Yield `function(item)` for each item, in order, computed ahead by `workers` processes.

    Raises:
        DataError: from `function`; a worker died for the second time or delivers nothing.
    """
    if workers == 0 or not items:
        yield from map(function, items)
        return
    batches = Batches(EpochSampler(len(items), shuffle=False), _CHUNK, ALONE)
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
    Batches of images with boxes are as in `BoxedImages.collate`.

    For training the order and the random choices are functions of (seed, epoch, index); call
    `loader.sampler.set_epoch(epoch)` before each epoch, as Lightning does. An epoch yields every sample
    once, except that a last training batch of a single sample is left out, because BatchNorm cannot train
    on it (that sample differs from epoch to epoch).

    Args:
        batch_size: samples per step of all processes together, of which each gets N; for evaluation, N.
        train: shuffle the samples; if false, sequential order, and always the samples of epoch 0.
        workers: processes that read ahead; they affect speed only. One that dies is replaced, once per epoch.
        shard: the part of this process.
        pinned: use page-locked memory, for asynchronous copies to a GPU; needs a usable GPU.
        patience: seconds that a worker may take for a batch.

    Raises:
        InputError: the samples of a step cannot be divided evenly.
        DataError: no samples; during iteration: a bad image, a worker died twice or delivers nothing.
    """
    batch_size = check_int("batch_size", batch_size, 1, MAX_SEED)
    workers = check_int("workers", workers, 0, 1024)
    seed = check_int("seed", seed, 0, MAX_SEED)
    if len(images) == 0:
        raise DataError(f"{images.name} has no samples")
    if train and batch_size % shard.parts:
        raise InputError(
            f"batch_size {batch_size} cannot be divided evenly among {shard.world} processes of "
            f"{shard.accumulate} batches each; use a multiple of {shard.parts}"
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
        # Its own generator for the workers' seeds, which nothing uses: the global one must not advance.
        generator=torch.Generator().manual_seed(seed),
    )
