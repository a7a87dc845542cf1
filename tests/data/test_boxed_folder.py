"""Folders of images with boxes, recognised and augmented (rows D14, D31, D34)."""

import json

import pytest
import torch

from cbam.data import boxed_folder, loader
from cbam.data.augment import AUGMENTATIONS
from cbam.errors import DataError, InputError
from cbam.train import recipes

SIDES = "<xmin>3</xmin><ymin>5</ymin><xmax>20</xmax><ymax>24</ymax>"
BOX = f"<object><name>{{}}</name><bndbox>{SIDES}</bndbox></object>"


@pytest.fixture
def make_voc(encoded, pixels):
    """make_voc(root, {"trainval": ["cat", "", ...]}) writes an image for each, "" without a box."""

    def make(root, splits):
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / folder).mkdir(parents=True)
        for split, kinds in splits.items():
            names = [f"{split}{i}" for i in range(len(kinds))]
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
            for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
                (root / "JPEGImages" / f"{name}.jpg").write_bytes(encoded(pixels(32, 40, i), "JPEG"))
                size = "<size><width>40</width><height>32</height></size>"
                text = f"<annotation>{size}{BOX.format(kind) if kind else ''}</annotation>"
                (root / "Annotations" / f"{name}.xml").write_text(text)
        return root

    return make


@pytest.fixture
def make_coco(encoded, pixels):
    """make_coco(file, folder, [crowd or not, ...]) writes a COCO file and its images, a box in each."""

    def make(file, folder, crowds, names=("cat", "dog")):
        folder.mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        for i in range(len(crowds)):
            (folder / f"{i}.jpg").write_bytes(encoded(pixels(32, 40, i), "JPEG"))
        told = {
            "images": [
                {"id": i, "file_name": f"{i}.jpg", "height": 32, "width": 40} for i in range(len(crowds))
            ],
            "categories": [{"id": k, "name": name} for k, name in enumerate(names, 1)],
            "annotations": [
                {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [2, 4, 18, 20], "iscrowd": crowd}
                for i, crowd in enumerate(crowds)
            ],
        }  # fmt: skip
        file.write_text(json.dumps(told))

    return make


def test_a_voc_folder_trains_on_images_with_boxes_and_tests_on_all(make_voc, tmp_path):
    # D31
    root = make_voc(
        tmp_path / "cells", {"trainval": ["b", "", "a"], "test": ["a", ""], "train": ["a"], "val": ["b"]}
    )
    train, val = boxed_folder(root)
    assert (train.name, val.name) == ("cells trainval", "cells test")
    assert (len(train), len(val), train.classes, val.classes) == (2, 2, ["a", "b"], ["a", "b"])
    assert any("1 of 3 images without objects left out" in note for note in train.notes)
    assert train.rules == "voc"


def test_train_and_val_are_used_if_there_is_no_test_split(make_voc, tmp_path):
    train, val = boxed_folder(make_voc(tmp_path / "v", {"train": ["a"], "val": ["a"], "trainval": ["a"]}))
    assert (train.name, val.name) == ("v train", "v val")


def test_the_years_of_voc_are_joined_and_tested_on_2007(make_voc, tmp_path):
    make_voc(tmp_path / "kit" / "VOC2007", {"trainval": ["a", "b"], "test": ["b"]})
    make_voc(tmp_path / "kit" / "VOC2012", {"trainval": ["c"]})
    train, val = boxed_folder(tmp_path / "kit")
    assert (len(train), len(val), val.classes) == (3, 1, ["a", "b", "c"])
    assert val[0]["labels"].tolist() == [2]


def test_a_single_year_of_voc_is_read_as_one_folder(make_voc, tmp_path):
    parts = {"train": ["a"], "val": ["a", "a"], "trainval": ["a"]}  # the splits that VOC2012 has
    make_voc(tmp_path / "kit" / "VOC2012", parts)
    train, val = boxed_folder(tmp_path / "kit")
    assert (train.name, val.name, len(train), len(val)) == ("kit train", "kit val", 1, 2)
    make_voc(tmp_path / "old" / "VOC2007", parts | {"test": ["a"]})
    train, val = boxed_folder(tmp_path / "old")
    assert (train.name, val.name) == ("old trainval", "old test")


def test_the_layouts_of_coco_and_of_coco_exports_are_recognised(make_coco, tmp_path):
    root = tmp_path / "coco"
    make_coco(root / "annotations" / "instances_train2017.json", root / "train2017", [0, 1, 0])
    make_coco(root / "annotations" / "instances_val2017.json", root / "val2017", [0, 1])
    train, val = boxed_folder(root)
    assert (len(train), len(val), train.rules) == (2, 2, "coco")  # crowds are in the test set only
    other = tmp_path / "export"
    for part in ("train", "valid"):
        make_coco(other / part / "_annotations.coco.json", other / part, [0])
    train, val = boxed_folder(other)
    assert (train.name, val.name) == ("export train", "export valid")


def test_different_classes_in_train_and_val_are_reported(make_coco, tmp_path):
    # D14
    make_coco(tmp_path / "train" / "_annotations.coco.json", tmp_path / "train", [0])
    make_coco(tmp_path / "valid" / "_annotations.coco.json", tmp_path / "valid", [0], ("cat", "cow"))
    with pytest.raises(DataError, match="have different categories: only one has cow, dog"):
        boxed_folder(tmp_path)


def test_an_unknown_layout_is_refused_with_what_was_found(make_voc, make_coco, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        boxed_folder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"known layout .*found notes\.txt"):
        boxed_folder(tmp_path)
    with pytest.raises(DataError, match=r"trainval\.txt and test\.txt.*found trainval"):
        boxed_folder(make_voc(tmp_path / "v", {"trainval": ["a"]}))
    with pytest.raises(DataError, match="no training images with a box"):
        boxed_folder(make_voc(tmp_path / "w", {"train": [""], "val": ["a"]}))
    root = tmp_path / "coco"
    make_coco(root / "annotations" / "instances_train2017.json", root / "train2017", [0])
    with pytest.raises(DataError, match=r"expected one instances_val\*\.json, found none"):
        boxed_folder(root)


@pytest.fixture
def cats(make_voc, tmp_path):
    return boxed_folder(make_voc(tmp_path / "v", {"train": ["cat"] * 4, "val": ["cat"]}))[0]


@pytest.mark.parametrize("how", ["flip", "ssd"])
def test_a_sample_is_a_function_of_seed_epoch_and_index(cats, how):
    # D34
    train = cats.augmented(how).seeded(5)
    state = torch.get_rng_state()
    first = [train[epoch, index] for epoch in range(6) for index in (1, 3)]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    again = [train[epoch, index] for epoch in range(6) for index in (1, 3)]
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("image", "boxes", "labels", "area"))
    other = [cats.augmented(how).seeded(6)[epoch, index] for epoch in range(6) for index in (1, 3)]
    assert any(not torch.equal(a["boxes"], b["boxes"]) for a, b in zip(first, other, strict=True))


def test_a_flip_also_flips_the_boxes(cats):
    plain, train = cats[0], cats.augmented("flip")
    seen = set()
    for epoch in range(12):
        sample = train[epoch, 0]
        flipped = not torch.equal(sample["image"], plain["image"])
        seen.add(flipped)
        if flipped:
            assert torch.equal(sample["image"], plain["image"].flip(2))
        expected = [20.0, 4.0, 38.0, 24.0] if flipped else [2.0, 4.0, 20.0, 24.0]
        assert sample["boxes"].tolist() == [expected]
        assert sample["area"].tolist() == [360.0]
    assert seen == {True, False}


def test_crops_keep_boxes_inside_and_all_columns_the_same_length(cats):
    train, sides = cats.augmented("ssd"), set()
    for epoch in range(60):
        sample = train[epoch, epoch % 4]
        height, width = sample["image"].shape[1:]
        sides.add((height, width))
        boxes = sample["boxes"]
        assert sample["image"].dtype == torch.uint8
        assert all(len(sample[name]) == len(boxes) for name in ("labels", "area", "crowd", "difficult"))
        assert (boxes >= 0).all()
        assert (boxes[:, 2::4] <= width).all()
        assert (boxes[:, 3::4] <= height).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    assert len(sides) > 10


def test_a_batch_has_lists_of_images_and_targets(cats):
    batch = next(iter(loader(cats.augmented("ssd"), 3, train=True, seed=1)))
    assert [image.dim() for image in batch["image"]] == [3, 3, 3]
    assert set(batch["target"][0]) == {"boxes", "labels", "area", "crowd", "difficult"}
    assert batch["index"].shape == (3,)


def test_an_unknown_augmentation_is_refused(cats):
    with pytest.raises(InputError, match="none, flip, ssd, got 'mosaic'"):
        cats.augmented("mosaic")
    assert recipes.AUGMENTATIONS == AUGMENTATIONS
