"""Training and validation samples from encoded images of any source.

Training: a random-resized crop (8 to 100 % of the area, 3:4 to 4:3) and a horizontal flip.
Validation: short side resized to 256/224 of the network input, then a centre crop.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cbam.data.decode import decode_bytes
from cbam.data.images import UNKNOWN_BOX, Images, draws
from cbam.errors import DataError, MissingExtraError

_log = logging.getLogger("cbam")


class Source(Protocol):
    """A source of encoded images. `notes` are oddities that `faults` found."""

    classes: list[str]
    targets: list[int]
    notes: list[str]

    def read(self, index: int) -> bytes:
        """The bytes of the file; OSError if the disk fails."""
        ...

    def name(self, index: int) -> str:
        """Printable name for messages."""
        ...

    def inner_name(self, index: int) -> str:
        """See `Images.inner_name`."""
        ...

    def faults(self) -> Iterator[tuple[int, str]]:
        """Yield index and reason for files that are obviously not images."""
        ...


class _Pictures(Images):
    def __init__(self, name: str, source: Source, size: int, notes: Sequence[str], *, exif: bool) -> None:
        try:
            import torchvision  # noqa: F401
        except ImportError as error:
            raise MissingExtraError.of("reading images", "vision") from error
        super().__init__(name, source.classes, source.targets, size=size, notes=notes)
        self._source, self._exif = source, exif

    def inner_name(self, index: int) -> str:
        return self._source.inner_name(index)

    def _where(self, index: int) -> str:
        return f"{self._source.name(index)} (class {self.classes[self.targets[index]]}, index {index})"

    def _picture(self, index: int) -> Tensor:
        """Decode an image to uint8 (3, H, W), reading up to three times if the disk fails."""
        for pause in (0.05, 0.2, None):
            try:
                return decode_bytes(self._source.read(index), self._where(index), exif=self._exif)
            except OSError as error:
                if pause is None:
                    raise DataError(f"{self._where(index)}: {error.strerror or error}") from error
                time.sleep(pause)
        raise AssertionError

    def _faults(self) -> Iterator[tuple[int, str]]:
        for index, fault in self._source.faults():
            yield index, f"{self._where(index)}: {fault}"
        self.notes += self._source.notes


class Validation(_Pictures):
    """Validation samples of a source; an unreadable image is an error.

    `resized` is the length of the short side before the centre crop.
    """

    def __init__(
        self, name: str, source: Source, size: int, notes: Sequence[str] = (), *, exif: bool = True
    ) -> None:
        super().__init__(name, source, size, notes, exif=exif)
        self.resized = short_side(size)
        broken = list(self._faults())
        if broken:
            raise DataError(
                f"{len(broken)} of {len(self)} validation images cannot be read; the first: {broken[0][1]}"
            )

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        return centre(self._picture(index), self.size, self.resized), UNKNOWN_BOX


class Training(_Pictures):
    """Training samples of a source; up to `unreadable` unreadable images are replaced.

    `_broken` marks them, in memory shared with the loader's workers.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        size: int,
        notes: Sequence[str],
        unreadable: int | None = None,
        *,
        exif: bool = True,
    ) -> None:
        super().__init__(name, source, size, notes, exif=exif)
        self._allowed = min(100, max(1, len(self) // 1000)) if unreadable is None else unreadable
        self._broken = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        for index, message in self._faults():
            self._mark(index, message)

    @property
    def unreadable(self) -> list[str]:
        return [self._source.name(i) for i in self._broken.nonzero().flatten().tolist()]

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        picture = self._readable(index)
        return augment(picture, self.size, draws("augmentation", self.seed, epoch, index)), UNKNOWN_BOX

    def whole(self, index: int) -> Tensor:
        from torchvision.transforms.v2 import functional as tv

        picture = self._readable(index)
        side = min(picture.shape[1:])
        return tv.resize(tv.center_crop(picture, [side, side]), [self.size, self.size], antialias=True)

    def _readable(self, index: int) -> Tensor:
        """The image, or the next readable one of its class, cyclically."""
        if not self._broken[index]:
            try:
                return self._picture(index)
            except DataError as error:
                self._mark(index, str(error))
        for other in self._candidates(index):
            if self._broken[other]:
                continue
            try:
                return self._picture(other)
            except DataError as error:
                self._mark(other, str(error))
        raise DataError(f"class {self.classes[self.targets[index]]} has no readable image")

    def _candidates(self, index: int) -> Iterator[int]:
        own = np.flatnonzero(np.asarray(self.targets) == self.targets[index]).tolist()
        here = own.index(index)
        yield from (*own[here:], *own[:here])

    def _mark(self, index: int, message: str) -> None:
        self._broken[index] = True
        count = int(self._broken.sum())
        if count > self._allowed:
            raise DataError(
                f"{count} of {len(self)} training images cannot be read, {self._allowed} allowed; "
                f"the last: {message}"
            )
        _log.warning("unreadable, replaced by the next image of its class: %s", message)


def augment(picture: Tensor, size: int, random: np.random.Generator) -> Tensor:
    """Random-resized crop and horizontal flip: uint8 (3, H, W) -> uint8 (3, size, size)."""
    from torchvision.transforms.v2 import functional as tv

    top, left, height, width = random_crop(picture.shape[1], picture.shape[2], random)
    flip = random.random() < 0.5
    crop = tv.resized_crop(picture, top, left, height, width, [size, size], antialias=True)
    return tv.horizontal_flip(crop) if flip else crop


def random_crop(height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop, distributed as in torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


def centre(picture: Tensor, size: int, resized: int) -> Tensor:
    """Resize the short side to `resized`, then crop the centre: uint8 (3, H, W) -> uint8 (3, size, size)."""
    from torchvision.transforms.v2 import functional as tv

    height, width = picture.shape[1:]
    limit = 4 * min(height, width)  # 1 x 20000 pixels would become enormous
    picture = tv.center_crop(picture, [min(height, limit), min(width, limit)])
    return tv.center_crop(tv.resize(picture, [resized], antialias=True), [size, size])


def short_side(size: int) -> int:
    """Length of a validation image's short side before the centre crop of `size` pixels."""
    return round(size * 256 / 224)
