"""Training and validation sets of images with boxes, from a COCO or Pascal VOC folder."""

import os
from collections.abc import Sequence
from pathlib import Path

from cbam.data.boxes import BoxedImages
from cbam.data.coco import coco
from cbam.data.decode import shown
from cbam.data.voc import voc
from cbam.errors import DataError

LAYOUTS = (
    "VOC2007 (and VOC2012), JPEGImages with Annotations and ImageSets, annotations/instances_*.json with "
    "image folders next to annotations/, or train/_annotations.coco.json"
)


PARTS = (("trainval", "test"), ("train", "val"))  # splits of a single VOC folder, in order of preference


def boxed_folder(path: str | os.PathLike) -> tuple[BoxedImages, BoxedImages]:
    """Read the training and the validation set of a folder. Its layout is detected:

        VOC2007/, VOC2012/   trainval of both, and test of VOC2007; a single one is read like the next
        JPEGImages/, ...     a single VOC folder: trainval and test, or train and val
        annotations/         instances_train*.json and instances_val*.json; images in train*/ and val*/
        train/, valid/       images and their _annotations.coco.json, as Roboflow exports them

    As usual, training leaves out crowd boxes and images without a box; validation keeps everything.

    Raises:
        DataError: no such folder, an unknown layout, or faulty data: see `coco` and `voc`.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{shown(path)}: {'a file; give its folder' if root.exists() else 'no such folder'}")
    train, val = _voc(root) or _coco(root) or _roboflow(root) or _none(root)
    name = shown(root.resolve().name) or "pictures"
    train.name, val.name = f"{name} {train.name}", f"{name} {val.name}"
    train = train.without_crowds().with_objects()
    if not len(train) or not len(val):
        raise DataError(
            f"{shown(path)}: no {'validation images' if len(train) else 'training images with a box'}"
        )
    return train, val


def voc_years(root: Path) -> list[Path]:
    """The folders VOC2007 and VOC2012 in `root`, as far as they exist."""
    return [root / year for year in ("VOC2007", "VOC2012") if (root / year).is_dir()]


def is_voc(root: Path) -> bool:
    """Whether `root` itself has the VOC layout."""
    return (root / "Annotations").is_dir() and (root / "ImageSets" / "Main").is_dir()


def _voc(root: Path) -> tuple[BoxedImages, BoxedImages] | None:
    years = voc_years(root)
    if len(years) == 1:
        (root,) = years
    if len(years) > 1:
        train = voc(years, "trainval")
        val = voc(years[0], "test", classes=train.classes or None)
    elif is_voc(root):
        splits = {path.stem for path in (root / "ImageSets" / "Main").glob("*.txt")}
        pair = next((pair for pair in PARTS if splits.issuperset(pair)), None)
        if pair is None:
            raise DataError(
                f"{shown(root / 'ImageSets' / 'Main')}: expected trainval.txt and test.txt, or train.txt and "
                f"val.txt; found {', '.join(sorted(splits)[:10]) or 'nothing'}"
            )
        train = voc(root, pair[0])
        val = voc(root, pair[1], classes=train.classes or None)  # no classes: refused later, as no boxes
    else:
        return None
    train.name, val.name = ("trainval", "test") if len(years) > 1 else pair
    return train, val


def _coco(root: Path) -> tuple[BoxedImages, BoxedImages] | None:
    files = {
        part: sorted((root / "annotations").glob(f"instances_{part}*.json")) for part in ("train", "val")
    }
    if not any(files.values()):
        return None
    for part, found in files.items():
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise DataError(
                f"{shown(root / 'annotations')}: expected one instances_{part}*.json, found {names}"
            )
    train, val = (coco(found[0], root / found[0].stem.removeprefix("instances_")) for found in files.values())
    return _same_classes(train, val)


def _roboflow(root: Path) -> tuple[BoxedImages, BoxedImages] | None:
    name = "_annotations.coco.json"
    parts = [part for part in ("train", "valid", "val", "test") if (root / part / name).is_file()]
    if len(parts) < 2 or parts[0] != "train":
        return None
    train, val = (coco(root / part / name, root / part) for part in parts[:2])
    train.name, val.name = parts[:2]
    return _same_classes(train, val)


def _same_classes(train: BoxedImages, val: BoxedImages) -> tuple[BoxedImages, BoxedImages]:
    if differ := differing(train.classes, val.classes):
        raise DataError(f"{train.name} and {val.name} have different categories: {differ}")
    return train, val


def differing(train: Sequence[str], val: Sequence[str]) -> str:
    """How the categories of two COCO files differ; "" if they are the same."""
    if list(train) == list(val):
        return ""
    only = sorted(set(train) ^ set(val))[:5]
    return f"only one has {', '.join(only)}" if only else "their order differs"


def _none(root: Path) -> tuple[BoxedImages, BoxedImages]:
    found = ", ".join(shown(path.name) for path in sorted(root.iterdir())[:5]) or "nothing"
    raise DataError(f"{shown(root)}: no images with boxes in a known layout ({LAYOUTS}); found {found}")
