"""The base class of labelled image sets, and the generators for their random choices.

A sample is a function of (seed, epoch, index): its random numbers come from a generator seeded with these.
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
    """A random generator determined only by its purpose and these numbers (0 to MAX_SEED)."""
    entropy = (_PURPOSES.index(purpose), *numbers)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


class Images(Dataset):
    """Labelled images of S x S pixels; a subclass implements `sample(epoch, index)`.

    Args:
        name: name of the set, for reports.
        classes: class names, in the order of the targets; printable.
        targets: class index of every sample.
        size: S.
        has_boxes: whether the samples have the box of their object.
        mean, std: per channel, of the values / 255, for normalisation.
        notes: counts of oddities, shown once.
    """

    collate = None  # the default: samples are stacked

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
        """Sample `index`, or (epoch, index); a bare index means epoch 0.

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
        """Path of a sample's file relative to the set; "" if there are no files."""
        return ""

    def whole(self, index: int) -> Tensor:
        """The central square of an image, resized to uint8 (3, S, S), without augmentation."""
        raise DataError(f"{self.name} generates new images in every epoch, so they cannot stay on the device")

    def loaded(self, batches: Any) -> Any:
        """An iterable over `batches`, for a set that loads them itself; None for any other."""
        return None

    @property
    def unreadable(self) -> list[str]:
        """The files found unreadable so far, in this process or in the loader's workers."""
        return []

    def seeded(self, seed: int) -> "Images":
        """The same set with another seed for its random choices; a validation set makes none."""
        other = copy.copy(self)
        other.seed = check_int("seed", seed, 0, MAX_SEED)
        return other

    def subset(self, n: int) -> "Images":
        """About n evenly spaced samples, stratified by class, at least one of each; always the same ones."""
        n = check_int("n", n, 1, MAX_SEED)
        targets = np.asarray(self.targets)
        chosen = []
        for label in np.unique(targets):
            own = np.flatnonzero(targets == label)
            count = min(len(own), max(1, round(n * len(own) / len(targets))))
            chosen.append(own[np.arange(count) * len(own) // count])
        return _Subset(self, np.sort(np.concatenate(chosen)).tolist())


class _Subset(Images):
    """Some samples of another set, renumbered from 0."""

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
    """SHA-256 of the file names in each set, in order, independent of where the files are stored."""
    digest = hashlib.sha256()
    for images in sets:
        digest.update(b"\n")
        for index in range(len(images)):
            digest.update(os.fsencode(images.inner_name(index)) + b"\0")
    return digest.hexdigest()


def check_int(name: str, value: int, least: int, most: int) -> int:
    """Return `value` as an int if it is from `least` to `most`, else raise an InputError."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value <= most:
        raise InputError(f"{name} must be an integer from {least} to {most}, got {value!r}")
    return operator.index(value)
