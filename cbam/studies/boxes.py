"""Images with boxes, for studies that train detectors."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from cbam.data import BoxedImages, boxed_folder
from cbam.data.decode import shown
from cbam.studies.study import Protocol


class BoxedPictures:
    """Like `cbam.studies.training.Pictures`, for a folder in COCO or Pascal VOC format.

    Args:
        folder: see `cbam.data.boxed_folder`.
        size: shorter side to which the detector resizes images; None for its default.
        limit: use this many training and validation images; None for all.
    """

    def __init__(self, folder: str, *, size: int | None = None, limit: int | None = None) -> None:
        train, val = boxed_folder(folder)
        self.all, self.size, self.rules = len(train), size, val.rules
        self.name = shown(Path(folder).resolve().name) or "pictures"
        if limit:
            train, val = train.subset(limit), val.subset(limit)
        self._found = train, val
        self.about: dict[str, Any] = {
            "name": self.name,
            "train": len(train),
            "val": len(val),
            "size": size,
            "classes": len(train.classes),
            "sha256": _digest(train, val),
            "objects": [train.digest(), val.digest()],
        }

    def ready(self, protocol: Protocol, device: torch.device) -> tuple[BoxedImages, BoxedImages]:
        """Both sets, with the protocol's augmentation."""
        train, val = self._found
        return train.augmented(protocol.augment or "none"), val


def _digest(*sets: BoxedImages) -> str:
    """A digest of classes, image names and boxes, which records store, without the labels."""
    whole = hashlib.sha256()
    for images in sets:
        names = [(p.name, p.height, p.width, images.count(i)) for i, p in enumerate(images.pictures)]
        whole.update(repr((images.classes, names)).encode() + images.all_boxes.tobytes())
    return whole.hexdigest()
