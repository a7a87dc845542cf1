"""Augmentation of images with boxes, by torchvision's transforms.

    none   nothing
    flip   horizontal flip with probability 0.5
    ssd    SSD's (Liu et al., arXiv 1512.02325): photometric distortion, zoom-out by up to four times onto a
           mean-coloured canvas, random IoU crop, horizontal flip

Torchvision draws from torch's global generator, which is seeded per sample and then restored.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch

from cbam.errors import InputError, MissingExtraError

AUGMENTATIONS = ("none", "flip", "ssd")
FILL = (123, 117, 104)  # ImageNet's mean, as in SSD
MIN_SIDE = 1.0  # pixels; a box that a crop leaves narrower or lower is dropped


def check_augmentation(how: str) -> str:
    """Return `how` if it is one of AUGMENTATIONS, else raise an InputError."""
    if how not in AUGMENTATIONS:
        raise InputError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {how!r}")
    return how


def augment_boxed(sample: dict[str, Any], how: str, random: np.random.Generator) -> dict[str, Any]:
    """Augment a sample of `BoxedImages`; a box of which a crop leaves less than a pixel is dropped."""
    try:
        from torchvision import tv_tensors
    except ImportError as error:
        raise MissingExtraError.of("augmenting images", "vision") from error
    size = tuple(sample["image"].shape[-2:])
    boxes = tv_tensors.BoundingBoxes(sample["boxes"], format="XYXY", canvas_size=size)  # pyright: ignore[reportCallIssue]
    with _seeded(random):
        image, boxes = _transform(how)(tv_tensors.Image(sample["image"]), boxes)
    height, width = image.shape[-2:]
    plain = boxes.as_subclass(torch.Tensor)
    low = plain.new_tensor([0.0, 0.0, 0.0, 0.0])
    plain = torch.minimum(torch.maximum(plain, low), plain.new_tensor([width, height, width, height]))
    sides = plain[:, 2:] - plain[:, :2]
    kept = (sides >= MIN_SIDE).all(1) if how == "ssd" else (sides > 0).all(1)
    changed = {name: sample[name][kept] for name in ("labels", "crowd", "difficult")}
    return sample | changed | {
        "image": image.as_subclass(torch.Tensor).contiguous(),
        "boxes": plain[kept],
        "area": sides.prod(1)[kept],
    }  # fmt: skip


@cache
def _transform(how: str):
    from torchvision.transforms import v2

    flip = v2.RandomHorizontalFlip(0.5)
    if how == "flip":
        return flip
    return v2.Compose(
        [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=list(FILL)), v2.RandomIoUCrop(), flip]
    )


@contextlib.contextmanager
def _seeded(random: np.random.Generator) -> Iterator[None]:
    """Seed torch's CPU generator from `random` inside the block; GPU generators are not touched."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(int(random.integers(2**62)))
    try:
        yield
    finally:
        generator.set_state(before)
