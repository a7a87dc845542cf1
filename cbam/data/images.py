"""A set of labelled pictures, and the loader that turns it into batches.

What a sample looks like and where it comes in an epoch are functions of (seed, epoch, index):
the sampler hands out (epoch, index), the set draws from a generator that these numbers start.
"""

import copy
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cbam.errors import DataError, InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNKNOWN_BOX = (float("nan"),) * 4


MAX_SEED = 2**32 - 1
_PURPOSES = ("order", "augmentation", "composition", "fixed composition")


def draws(purpose: str, *numbers: int) -> np.random.Generator:
    """A random generator that is a function of its purpose and of these numbers (0 to MAX_SEED) alone."""
    entropy = (_PURPOSES.index(purpose), *numbers)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


class Images(Dataset):
    """Labelled pictures, all brought to S x S pixels; a subclass says what sample (epoch, index) is.

    Args:
        name: of the set, for reports.
        classes: the names, in the order of the targets; printable.
        targets: the class of every sample.
        size: S.
        has_boxes: whether the samples carry the box of their object.
        mean, std: per channel, of the values / 255; what to normalise with.
        notes: counted oddities, to be shown once.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        targets: Sequence[int],
        *,
        size: int,
        has_boxes: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        notes: Sequence[str] = (),
    ) -> None:
        self.name, self.classes, self.targets = name, list(classes), list(targets)
        self.size, self.has_boxes, self.notes = size, has_boxes, list(notes)
        self.mean, self.std = tuple(mean), tuple(std)
        self.seed = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Sample `index`, or (epoch, index); an index alone means epoch 0.

        Returns:
            image: uint8 (3, S, S); target: int; index: int;
            box: float32 (4,), x0 y0 x1 y1 in pixels, NaN where unknown.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        epoch, index = operator.index(epoch), operator.index(index)
        if epoch < 0 or not 0 <= index < len(self):
            raise IndexError(f"epoch {epoch}, index {index}: {self.name} has {len(self)} samples")
        image, box = self.sample(epoch, index)
        return {
            "image": image,
            "target": self.targets[index],
            "index": index,
            "box": torch.tensor(box, dtype=torch.float32),
        }

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        """The picture, uint8 (3, S, S), and its box."""
        raise NotImplementedError

    def whole(self, index: int) -> Tensor:
        """The middle square of a picture, brought to uint8 (3, S, S) without any random choice."""
        raise DataError(f"{self.name} makes its pictures anew in every epoch, so none can be kept")

    def batches(self, batch_size: int, *, train: bool, seed: int) -> Any:
        """Batches of the set's own making, in place of a DataLoader's; None where it makes none."""
        return None

    @property
    def unreadable(self) -> list[str]:
        """The files that were found unreadable so far, in this process or in the loader's workers."""
        return []

    def seeded(self, seed: int) -> "Images":
        """The same set, its random choices made by `seed`; a validation set makes none."""
        other = copy.copy(self)
        other.seed = check_int("seed", seed, 0, MAX_SEED)
        return other

    def subset(self, n: int) -> "Images":
        """About n samples, evenly spaced, every class in its share and at least once; always the same."""
        n = check_int("n", n, 1, MAX_SEED)
        targets = np.asarray(self.targets)
        chosen = []
        for label in np.unique(targets):
            own = np.flatnonzero(targets == label)
            count = min(len(own), max(1, round(n * len(own) / len(targets))))
            chosen.append(own[np.arange(count) * len(own) // count])
        return _Subset(self, np.sort(np.concatenate(chosen)).tolist())


class _Subset(Images):
    """Some samples of another set, each as it is there, numbered from 0."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        super().__init__(
            images.name,
            images.classes,
            [images.targets[i] for i in indices],
            size=images.size,
            has_boxes=images.has_boxes,
            mean=images.mean,
            std=images.std,
            notes=[*images.notes, f"{len(indices)} of the {len(images)} samples"],
        )
        self._images, self._indices = images, list(indices)

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        return self._images.sample(epoch, self._indices[index])

    def whole(self, index: int) -> Tensor:
        return self._images.whole(self._indices[index])

    @property
    def unreadable(self) -> list[str]:
        return self._images.unreadable

    def seeded(self, seed: int) -> "Images":
        other = super().seeded(seed)
        assert isinstance(other, _Subset)
        other._images = self._images.seeded(seed)
        return other


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) for every index once: in an order that (seed, epoch) makes, or in plain order.

    In plain order the epoch is always 0, so that an evaluation sees the same samples each time.
    """

    def __init__(self, length: int, *, shuffle: bool, seed: int = 0) -> None:
        self.length, self.shuffle, self.seed, self.epoch = length, shuffle, seed, 0
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

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if not self.shuffle:
            return iter([(0, index) for index in range(self.length)])
        order = draws("order", self.seed, self.epoch).permutation(self.length).tolist()
        return iter([(self.epoch, index) for index in order[self._start() :]])

    def __len__(self) -> int:
        return self.length - self._start()


class _Loader(DataLoader):
    """A DataLoader whose workers' DataErrors arrive as they were raised, without the worker's traceback."""

    def __iter__(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        batches = super().__iter__()
        try:
            yield from batches
        except DataError as error:
            if self.num_workers:  # left to the garbage collector, they end after a time-out of 5 s
                batches._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]
                self._iterator = None
            lines = [line for line in str(error).splitlines() if line.startswith(_RAISED)]
            raise DataError(lines[-1].removeprefix(_RAISED) if lines else str(error)) from None


_RAISED = f"{DataError.__module__}.{DataError.__name__}: "


def loader(images: Images, batch_size: int, *, train: bool, seed: int = 0, workers: int = 0) -> DataLoader:
    """Batches of `images` as dicts: image uint8 (N, 3, S, S), target (N,), index (N,), box (N, 4).

    For training the order and the random choices are functions of (seed, epoch, index); call
    `loader.sampler.set_epoch(epoch)` before each epoch, as Lightning does. Every sample comes once in an
    epoch. One exception: a last training batch of a single sample is left out, for BatchNorm cannot
    train on it (that sample differs from epoch to epoch).

    Args:
        batch_size: N.
        train: shuffled if true; in plain order, always as in epoch 0, if false.
        workers: processes that read ahead; they change the speed alone.
    """
    batch_size = check_int("batch_size", batch_size, 1, MAX_SEED)
    workers = check_int("workers", workers, 0, 1024)
    seed = check_int("seed", seed, 0, MAX_SEED)
    if len(images) == 0:
        raise DataError(f"{images.name} has no samples")
    own = images.batches(batch_size, train=train, seed=seed)
    if own is not None:
        return own
    return _Loader(
        images.seeded(seed) if train else images,
        batch_size,
        sampler=EpochSampler(len(images), shuffle=train, seed=seed),
        drop_last=train and len(images) > batch_size and len(images) % batch_size == 1,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Its own, for the workers' seeds, which nothing uses: the caller's generator is left alone.
        generator=torch.Generator().manual_seed(seed),
    )


def check_int(name: str, value: int, least: int, most: int) -> int:
    """`value`, if it is an integer from `least` to `most`; else an InputError that says so."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value <= most:
        raise InputError(f"{name} must be an integer from {least} to {most}, got {value!r}")
    return operator.index(value)
