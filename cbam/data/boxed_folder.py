"""A folder of COCO or Pascal VOC -> a training and a validation set of images with boxes."""

import os
from collections.abc import Sequence
from pathlib import Path

from cbam.data.boxes import BoxedImages
from cbam.data.coco import coco
from cbam.data.decode import shown
from cbam.data.voc import voc
from cbam.errors import DataError

LAYOUTS = (
    "VOC2007 (and VOC2012), JPEGImages with Annotations and ImageSets, annotations/instances_*.json beside "
    "their folders of images, or train/_annotations.coco.json"
)


PARTS = (("trainval", "test"), ("train", "val"))  # of one folder like VOC's, the first that are there


def boxed_folder(path: str | os.PathLike) -> tuple[BoxedImages, BoxedImages]:
    """The training and the validation set of a folder. Its form is found out:

        VOC2007/, VOC2012/   trainval of both, and the test of VOC2007; one alone is the next
        JPEGImages/, ...     one folder like VOC's: trainval and test, or train and val
        annotations/         instances_train*.json and instances_val*.json; images in train*/ and val*/
        train/, valid/       images and their _annotations.coco.json, as Roboflow exports them

    Training has no boxes of crowds and no image without a box, as is usual; validation has everything.

    Raises:
        DataError: no such folder, none of these forms, or faults in it: see `coco` and `voc`.
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
    """The folders of VOC's years in `root`; one of them alone is a folder in VOC's form itself."""
    return [root / year for year in ("VOC2007", "VOC2012") if (root / year).is_dir()]


def is_voc(root: Path) -> bool:
    """Whether `root` is itself in VOC's form."""
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
                f"{shown(root / 'ImageSets' / 'Main')}: trainval.txt and test.txt, or train.txt and val.txt, "
                f"are needed; there is {', '.join(sorted(splits)[:10]) or 'nothing'}"
            )
        train = voc(root, pair[0])
        val = voc(root, pair[1], classes=train.classes or None)  # without a class nothing is trained below
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
            told = ", ".join(path.name for path in found) or "none"
            raise DataError(
                f"{shown(root / 'annotations')}: one instances_{part}*.json is needed, there is {told}"
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
        raise DataError(f"{train.name} and {val.name} do not have the same categories: {differ}")
    return train, val


def differing(train: Sequence[str], val: Sequence[str]) -> str:
    """How the categories of two COCO files differ; "" if they do not."""
    if list(train) == list(val):
        return ""
    only = sorted(set(train) ^ set(val))[:5]
    return f"only one has {', '.join(only)}" if only else "their order differs"


def _none(root: Path) -> tuple[BoxedImages, BoxedImages]:
    there = ", ".join(shown(path.name) for path in sorted(root.iterdir())[:5]) or "nothing"
    raise DataError(f"{shown(root)}: no images with boxes in a known form ({LAYOUTS}); there is {there}")
