"""Mixup and CutMix of a batch with its own reverse, a function of (seed, epoch, step, part)."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cbam.data.images import draws
from cbam.train.recipe import Recipe


@dataclass(frozen=True)
class Mix:
    """A batch of N images in which image i has a share of `share`, and image N - 1 - i the rest."""

    image: Tensor
    share: float


def mix(image: Tensor, recipe: Recipe, numbers: tuple[int, ...]) -> Mix:
    """(N, 3, H, W) float -> the same shape, mixed by `recipe`; `numbers` seed the draw."""
    if not (recipe.mixup or recipe.cutmix):
        return Mix(image, 1.0)
    random = draws("mixing", *numbers)
    cuts = recipe.cutmix > 0 and (recipe.mixup == 0 or random.random() < 0.5)
    alpha = recipe.cutmix if cuts else recipe.mixup
    share = float(random.beta(alpha, alpha))
    if not cuts:
        return Mix(image * share + image.flip(0) * (1 - share), share)
    height, width = image.shape[2:]
    top, bottom, left, right = _box(height, width, share, random)
    mixed, other = image.clone(), image.flip(0)
    mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
    return Mix(mixed, 1 - (bottom - top) * (right - left) / (height * width))


def _box(height: int, width: int, share: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a box with 1 - share of the area around a random point, clipped."""
    side = np.sqrt(1 - share)
    y, x = random.integers(height), random.integers(width)
    h, w = int(height * side), int(width * side)
    rows = np.clip([y - h // 2, y + h - h // 2], 0, height)
    columns = np.clip([x - w // 2, x + w - w // 2], 0, width)
    return int(rows[0]), int(rows[1]), int(columns[0]), int(columns[1])
