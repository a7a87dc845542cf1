"""Image sets that stay on a device and are augmented there, for data that fit next to the network.

A small network on small images waits for the CPU that decodes and crops them. Here every image is decoded
once; an epoch is a few tensor operations per batch, the same on a CPU and on a GPU.

Shapes: N images in the set, B in a batch, S x S pixels.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cbam.data.images import UNKNOWN_BOX, Images, draws
from cbam.data.loading import Batches

_CHUNK = 256  # images read before an error or Ctrl-C takes effect
TRIES = 10  # as in torchvision's RandomResizedCrop
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


class Resident(Images):
    """The images of another set as one tensor on `device`.

    For training, the central square of each image is kept at S x S; samples are random-resized crops of it
    (8 to 100 % of the area, 3:4 to 4:3), randomly flipped: a function of (seed, epoch, index), for any batch
    and device. Crops lie on whole pixels and are only enlarged (bilinearly), so no antialiasing is needed.
    Validation images are those of the other set, unchanged.

    Args:
        images: a set of images on disk, such as from `image_folder`.
        augment: whether to crop and flip, for training.

    Raises:
        DataError: an image cannot be read, or the set generates new images in every epoch.
    """

    def __init__(self, images: Images, device: torch.device | str, *, augment: bool) -> None:
        super().__init__(
            images.name,
            images.classes,
            images.targets,
            size=images.size,
            mean=images.mean,
            std=images.std,
            notes=images.notes,
        )
        self.augment, self.device = augment, torch.device(device)
        self.pixels = torch.empty((len(images), 3, images.size, images.size), dtype=torch.uint8)
        load = images.whole if augment else lambda index: images.sample(0, index)[0]
        with ThreadPoolExecutor() as pool:  # decoding releases the GIL
            for first in range(0, len(images), _CHUNK):
                chunk = range(first, min(first + _CHUNK, len(images)))
                for index, picture in zip(chunk, pool.map(load, chunk), strict=True):
                    self.pixels[index] = picture
        self.pixels = self.pixels.to(self.device)
        self.labels = torch.tensor(self.targets, device=self.device)
        self._drawn: tuple[tuple[int, int], Tensor] | None = None

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        return self.at(epoch, torch.tensor([index], device=self.device))[0], UNKNOWN_BOX

    def at(self, epoch: int, indices: Tensor) -> Tensor:
        """The samples of these indices in an epoch: (B,) -> uint8 (B, 3, S, S)."""
        pictures = self.pixels[indices]
        return crop_and_flip(pictures, self._crops(epoch)[indices]) if self.augment else pictures

    def loaded(self, batches: Batches) -> "ResidentBatches":
        return ResidentBatches(self, batches)

    def _crops(self, epoch: int) -> Tensor:
        """The crops of an epoch, on the device; the most recent epoch is cached."""
        if self._drawn is None or self._drawn[0] != (self.seed, epoch):
            drawn = draw_crops(self.seed, epoch, len(self), self.size)
            self._drawn = (self.seed, epoch), torch.from_numpy(drawn).to(self.device)
        return self._drawn[1]


class ResidentBatches:
    """Batches in the format of `cbam.data.loader`, from a set on a device."""

    def __init__(self, images: Resident, batches: Batches) -> None:
        self.dataset, self.batch_sampler, self.sampler = images, batches, batches.sampler
        self.batch_size = batches.size

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def end(self) -> None:
        """Do nothing: there are no workers."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for keys in self.batch_sampler:
            indices = torch.tensor([index for _, index in keys]).to(self.dataset.device, non_blocking=True)
            yield {
                "image": self.dataset.at(keys[0][0], indices),
                "target": self.dataset.labels[indices],
                "index": indices,
                "box": torch.full((len(keys), 4), float("nan"), device=indices.device),
            }


def draw_crops(seed: int, epoch: int, count: int, size: int) -> np.ndarray:
    """Draw the crops of an epoch: int64 (count, 5) of top, left, height, width and whether flipped.

    They follow torchvision's RandomResizedCrop: the first of TRIES shapes that fits, else the whole image.
    Row i depends only on (seed, epoch, i), because the numbers are drawn row by row.
    """
    u = draws("augmentation", seed, epoch).random((count, 2 * TRIES + 3))
    area = size**2 * (AREA[0] + (AREA[1] - AREA[0]) * u[:, :TRIES])
    low, high = np.log(RATIO[0]), np.log(RATIO[1])
    ratio = np.exp(low + (high - low) * u[:, TRIES : 2 * TRIES])
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= size) & (heights > 0) & (heights <= size)
    rows, first = np.arange(count), fits.argmax(1)
    width = np.where(fits.any(1), widths[rows, first], size)
    height = np.where(fits.any(1), heights[rows, first], size)
    top, left, flip = u[:, 2 * TRIES], u[:, 2 * TRIES + 1], u[:, 2 * TRIES + 2] < 0.5
    places = np.floor(top * (size - height + 1)), np.floor(left * (size - width + 1))
    return np.stack([*places, height, width, flip], axis=1).astype(np.int64)


def crop_and_flip(pictures: Tensor, crops: Tensor) -> Tensor:
    """Crop, enlarge bilinearly to S x S, flip: uint8 (B, 3, S, S), int64 (B, 5) -> uint8 (B, 3, S, S).

    Pixels outside a crop do not affect it, as if it were cut out first and then enlarged.
    """
    size = pictures.shape[-1]
    top, left, height, width, flip = crops.to(torch.float32).unbind(1)
    y, x = _coordinates(top, height, size), _coordinates(left, width, size)
    x = torch.where(flip[:, None] > 0, x.flip(1), x)
    scale = 2 / (size - 1)
    y, x = (y * scale - 1)[:, :, None].expand(-1, -1, size), (x * scale - 1)[:, None, :].expand(-1, size, -1)
    enlarged = F.grid_sample(
        pictures.float(), torch.stack([x, y], dim=-1), padding_mode="border", align_corners=True
    )
    return enlarged.round_().clamp_(0, 255).to(torch.uint8)


def _coordinates(first: Tensor, length: Tensor, size: int) -> Tensor:
    """Coordinates in the image of the `size` pixels of an enlarged crop: (B,) -> (B, S)."""
    steps = torch.arange(size, device=first.device, dtype=torch.float32) + 0.5
    inside = steps * (length / size)[:, None] - 0.5
    return first[:, None] + torch.minimum(inside.clamp(min=0), (length - 1)[:, None])
