"""A set of labelled images, and the draws that its random choices come from.

What a sample looks like is a function of (seed, epoch, index): the set draws from a generator that these
numbers start.
"""

import copy
import hashlib
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cbam.errors import DataError, InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNKNOWN_BOX = (float("nan"),) * 4


MAX_SEED = 2**32 - 1
_PURPOSES = ("order", "augmentation", "composition", "fixed composition", "mixing", "rank")


def draws(purpose: str, *numbers: int) -> np.random.Generator:
    """A random generator that is a function of its purpose and of these numbers (0 to MAX_SEED) alone."""
    entropy = (_PURPOSES.index(purpose), *numbers)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


class Images(Dataset):
    """Labelled images, all brought to S x S pixels; a subclass says what sample (epoch, index) is.

    Args:
        name: of the set, for reports.
        classes: the names, in the order of the targets; printable.
        targets: the class of every sample.
        size: S.
        has_boxes: whether the samples carry the box of their object.
        mean, std: per channel, of the values / 255; what to normalise with.
        notes: counted oddities, to be shown once.
    """

    collate = None  # samples are stacked

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
        """The image, uint8 (3, S, S), and its box."""
        raise NotImplementedError

    def inner_name(self, index: int) -> str:
        """The path of a sample's file inside the set, wherever that lies; "" where there are no files."""
        return ""

    def whole(self, index: int) -> Tensor:
        """The middle square of an image, brought to uint8 (3, S, S) without any random choice."""
        raise DataError(f"{self.name} makes its images anew in every epoch, so none can be kept")

    def loaded(self, batches: Any) -> Any:
        """The batches that `loading.Batches` names, of a set that loads them itself; None of any other."""
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

    def inner_name(self, index: int) -> str:
        return self._images.inner_name(self._indices[index])

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


def digest_of_names(*sets: Any) -> str:
    """A SHA-256 of the names inside each set, in their order: equal wherever the files lie."""
    digest = hashlib.sha256()
    for images in sets:
        digest.update(b"\n")
        for index in range(len(images)):
            digest.update(os.fsencode(images.inner_name(index)) + b"\0")
    return digest.hexdigest()


def check_int(name: str, value: int, least: int, most: int) -> int:
    """`value`, if it is an integer from `least` to `most`; else an InputError that says so."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value <= most:
        raise InputError(f"{name} must be an integer from {least} to {most}, got {value!r}")
    return operator.index(value)
