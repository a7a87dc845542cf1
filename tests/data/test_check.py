"""`check` reports every fault of a data set, with file and line."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from cbam.data import check
from cbam.data.check import NO_END
from cbam.data.decode import MAX_BYTES
from cbam.errors import DataError


def told(path, **options):
    kind, findings = check(path, **options)
    return kind, [str(finding) for finding in findings]


@pytest.fixture
def classes(make_folder):
    make_folder({"cat": 3, "dog": 3}, inside="train")
    return make_folder({"cat": 2, "dog": 2}, inside="val")


def test_sound_class_folders_have_no_faults(classes):
    assert told(classes) == ("class folders of images", [])
    assert told(classes, deep=True) == ("class folders of images", [])


def test_every_file_that_is_not_an_image_is_named(classes):  # D3
    (classes / "train/cat/0.jpg").write_bytes(b"")
    (classes / "val/dog/1.jpg").write_bytes(b"<html>sorry</html>")
    (classes / "val/dog/0.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    _, faults = told(classes)
    assert [fault.replace(str(classes), "") for fault in faults] == [
        "/train/cat/0.jpg: not an image (empty file)",
        "/val/dog/0.jpg: its header cannot be read",
        "/val/dog/1.jpg: not an image (starts with '<html'); supported: JPEG, PNG, WEBP, BMP, GIF, TIFF",
    ]


def test_deep_finds_decoding_errors_and_a_missing_end_marker(classes):  # D1, D2
    cut, open_end = classes / "train/cat/0.jpg", classes / "train/dog/1.jpg"
    cut.write_bytes(cut.read_bytes()[:-60])
    open_end.write_bytes(open_end.read_bytes()[:-2])
    assert told(classes)[1] == []
    _, faults = told(classes, deep=True)
    assert len(faults) == 2
    assert faults[0].startswith(f"{cut}: damaged or unsupported image")
    assert faults[1] == f"{open_end}: {NO_END}"
    assert open_end.read_bytes()[-2:] != b"\xff\xd9"  # the file is not rewritten


def test_deep_finds_files_shared_by_train_and_val_or_by_two_classes(classes):  # D19
    train, val = classes / "train", classes / "val"
    shutil.copy(train / "cat/0.jpg", val / "cat/again.jpg")
    shutil.copy(train / "dog/1.jpg", train / "cat/odd.jpg")
    shutil.copy(train / "dog/2.jpg", train / "dog/twice.jpg")  # only seen twice as often
    assert told(classes)[1] == []
    assert told(classes, deep=True)[1] == [
        f"{train}/dog/1.jpg: the same file is in class cat: {train}/cat/odd.jpg",
        f"{val}/cat/again.jpg: the same file is used to train: {train}/cat/0.jpg",
    ]


def test_a_file_that_vanishes_before_it_is_compared_does_not_end_the_check(classes):
    (classes / "train/cat/0.jpg").write_bytes(b"")
    shutil.copy(classes / "train/dog/1.jpg", classes / "val/dog/again.jpg")
    left = 11  # all are checked before the first is compared

    def passed(share):
        nonlocal left
        left -= 1
        if left == 0:
            (classes / "val/cat/0.jpg").unlink()

    faults = [str(finding) for finding in check(classes, deep=True, passed=passed)[1]]
    assert [fault.rpartition("/")[2] for fault in faults] == ["0.jpg: not an image (empty file)", "1.jpg"]


@pytest.mark.parametrize("more", [b"", b"\0" * 9, b"camera"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_with_data_after_its_end_marker_is_sound(classes, encoded, pixels, more, progressive):  # D2
    thumbnail = encoded(pixels(8, 8), "JPEG")
    exif = Image.Exif()
    exif[0x010E] = "x"
    data = encoded(pixels(32, 32), "JPEG", progressive=progressive, exif=exif.tobytes() + thumbnail)
    (classes / "train/cat/0.jpg").write_bytes(data + more)
    assert told(classes, deep=True)[1] == []
    (classes / "train/cat/0.jpg").write_bytes(data[:-2])
    assert len(told(classes, deep=True)[1]) == 1


def test_a_fault_of_a_folder_does_not_hide_those_of_files(classes):  # D12
    shutil.rmtree(classes / "val/dog")
    (classes / "train/cat/0.jpg").write_bytes(b"text")
    _, faults = told(classes)
    assert "only one class" in faults[0]
    assert faults[1].startswith(f"{classes}/train/cat/0.jpg: not an image")


def test_folders_and_broken_links_named_like_a_coco_file_are_ignored(classes):  # D17
    (classes / "labels.json").mkdir()
    (classes / "gone.json").symlink_to(classes / "nowhere.json")
    assert told(classes) == ("class folders of images", [])


def test_a_missing_folder_and_a_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        check(tmp_path / "no")
    (tmp_path / "file.zip").write_bytes(b"x")
    with pytest.raises(DataError, match="a file; give its folder"):
        check(tmp_path / "file.zip")


@pytest.fixture
def coco_folder(tmp_path, encoded, pixels):
    """COCO's own layout: two files of instances, a folder of images for each."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        (root / split / "1.jpg").write_bytes(encoded(pixels(20, 30), "JPEG", comment=split.encode()))
        lists = {
            "images": [{"id": 1, "file_name": "1.jpg", "height": 20, "width": 30}],
            "annotations": [
                {"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0}
            ],
            "categories": [{"id": 1, "name": "x"}],
        }
        text = json.dumps(lists).replace('"annotations"', '\n"annotations"')
        (root / f"annotations/instances_{split}.json").write_text(text)
    (root / "annotations/captions_val2017.json").write_text('{"images": [], "annotations": [{"caption": 1}]}')
    return root


def test_the_images_of_a_coco_file_are_found_by_its_name(coco_folder):
    assert told(coco_folder, deep=True) == ("COCO", [])
    (coco_folder / "val2017").rename(coco_folder / "images")
    assert told(coco_folder) == ("COCO", [])


def test_faults_of_coco_files_and_images_are_reported_with_their_lines(coco_folder):
    file = coco_folder / "annotations/instances_val2017.json"
    file.write_text(
        file.read_text().replace("[1, 1, 3, 3]", "[1, 1, 0, 3]").replace('"height": 20', '"height": 0')
    )
    (coco_folder / "train2017/1.jpg").write_bytes(b"text")
    _, faults = told(coco_folder)
    assert faults == [
        f"{coco_folder}/train2017/1.jpg: not an image (starts with 'text'); "
        "supported: JPEG, PNG, WEBP, BMP, GIF, TIFF",
        f"{file} line 1 column 13: image 1 has height 0 and width 30, expected pixels",
        f"{file} line 2 column 17: image_id 1 of annotation 5 is not among the file's images",
    ]


def test_a_truncated_coco_file_is_reported(coco_folder):  # D21
    file = coco_folder / "annotations/instances_train2017.json"
    file.write_text(file.read_text().partition(" 9,")[0])
    _, faults = told(coco_folder)
    column = len(file.read_text().splitlines()[1]) + 1
    assert faults == [f"{file} line 2 column {column}: the file is truncated"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_coco_file_in_another_encoding_is_reported(coco_folder, encoding):
    for file in (coco_folder / "annotations").glob("instances_*.json"):
        file.write_text(file.read_text(), encoding=encoding)
    kind, faults = told(coco_folder)
    assert kind == "COCO"
    assert len(faults) == 2


def test_images_and_their_coco_file_may_share_a_folder(coco_folder):
    inner = coco_folder / "val2017"
    (coco_folder / "annotations/instances_val2017.json").rename(inner / "_annotations.coco.json")
    shutil.rmtree(coco_folder / "annotations")
    assert told(coco_folder, deep=True) == ("COCO", [])
    (inner / "1.jpg").unlink()
    _, faults = told(coco_folder)
    assert len(faults) == 1
    assert faults[0].endswith("1.jpg is missing")


def test_each_fault_of_a_voc_folder_is_reported_once_with_its_line(tmp_path, encoded):
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "JPEGImages/a.jpg").write_bytes(encoded(np.zeros((9, 9, 3), np.uint8), "JPEG")[:-2])
    box = "<bndbox><xmin>3</xmin><ymin>3</ymin>\n<xmax>3</xmax><ymax>5</ymax></bndbox>"
    text = f"<annotation>\n<object><name>x</name>\n{box}</object></annotation>"
    (tmp_path / "Annotations/a.xml").write_text(text)
    for split in ("train", "trainval", "cat_train"):
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text("a\n")
    degenerate = f"{tmp_path}/Annotations/a.xml line 3: a box has no width or no height: dropped (x: 3 3 3 5)"
    assert told(tmp_path) == ("VOC", [degenerate])
    assert told(tmp_path, deep=True) == ("VOC", [degenerate, f"{tmp_path}/JPEGImages/a.jpg: {NO_END}"])
    (tmp_path / "ImageSets/Main/val.txt").write_text("b\n")
    assert f"{tmp_path}/ImageSets/Main/val.txt line 1: there is no image b" in told(tmp_path)[1][-1]


def test_an_image_of_another_size_than_stated_is_reported(coco_folder, encoded, pixels):  # D6
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = encoded(pixels(30, 20), "JPEG", exif=turned.tobytes())  # shown as 20 x 30
    (coco_folder / "train2017/1.jpg").write_bytes(upright)
    (coco_folder / "val2017/1.jpg").write_bytes(encoded(pixels(30, 20), "JPEG"))
    wrong = "20x30 pixels, but its annotation says 30x20, so its boxes cannot be used"
    assert told(coco_folder) == ("COCO", [f"{coco_folder}/val2017/1.jpg: {wrong}"])
    assert told(coco_folder, deep=True) == ("COCO", [f"{coco_folder}/val2017/1.jpg: {wrong}"])


def test_a_file_too_large_to_read_does_not_end_the_check(coco_folder, encoded, pixels):  # D6
    large = coco_folder / "val2017/1.jpg"
    large.write_bytes(encoded(pixels(30, 20), "JPEG"))  # of another size than annotated
    with large.open("r+b") as file:
        file.truncate(MAX_BYTES + 1)  # sparse
    assert told(coco_folder) == ("COCO", [])  # which reads headers
    kind, (fault,) = told(coco_folder, deep=True)
    assert kind == "COCO"
    assert fault.startswith(f"{large}: {MAX_BYTES + 1} bytes; the limit")


def test_other_categories_and_shared_images_of_coco_splits_are_reported(
    coco_folder, encoded, pixels
):  # D14, D19
    (coco_folder / "val2017/1.jpg").write_bytes((coco_folder / "train2017/1.jpg").read_bytes())
    file = coco_folder / "annotations/instances_val2017.json"
    file.write_text(file.read_text().replace('"x"', '"y"'))
    categories = f"{file}: its categories are not those of the training file: only one has x, y"
    twin = f"{coco_folder}/val2017/1.jpg: the same file is used to train: {coco_folder}/train2017/1.jpg"
    assert told(coco_folder) == ("COCO", [categories])
    assert told(coco_folder, deep=True) == ("COCO", [categories, twin])


@pytest.fixture
def voc_years(tmp_path, encoded, pixels):
    """VOC2007 with an image to train on and one to test on, of one class."""
    root = tmp_path / "VOCdevkit/VOC2007"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    box = "<bndbox><xmin>3</xmin><ymin>3</ymin><xmax>6</xmax><ymax>5</ymax></bndbox>"
    for name, split in (("a", "trainval"), ("b", "test")):
        (root / f"JPEGImages/{name}.jpg").write_bytes(encoded(pixels(9, 9), "JPEG"))
        text = f"<annotation><object><name>x</name>{box}</object></annotation>"
        (root / f"Annotations/{name}.xml").write_text(text)
        (root / f"ImageSets/Main/{split}.txt").write_text(f"{name}\n")
    return root


def test_the_years_of_voc_are_checked_as_training_reads_them(voc_years, pixels, encoded):  # D14, D19
    (voc_years / "JPEGImages/b.jpg").write_bytes(encoded(pixels(9, 8), "JPEG"))
    assert told(voc_years.parent, deep=True) == ("VOC", [])
    (voc_years / "JPEGImages/b.jpg").write_bytes((voc_years / "JPEGImages/a.jpg").read_bytes())
    file = voc_years / "Annotations/b.xml"
    file.write_text(file.read_text().replace("<name>x", "<name>y"))
    _, faults = told(voc_years.parent, deep=True)
    assert faults == [
        f"{file} line 1: class 'y' is in test but not in the training images",
        f"{voc_years}/JPEGImages/b.jpg: the same file is used to train: {voc_years}/JPEGImages/a.jpg",
    ]
    assert told(voc_years) == ("VOC", faults[:1])


def test_parquet_files_are_checked_as_training_reads_them(tmp_path, monkeypatch, encoded, pixels):  # D1 D3
    class Rows:
        classes = ("ant", "bee")
        targets = (0, 1, 1)

        def __init__(self, name):
            self._name = name

        def read(self, index):
            sound = encoded(pixels(20, 20, 0), "PNG")
            return (sound, sound[:60], b"<html>")[index]

        def name(self, index):
            return f"{self._name} row {index}"

        def faults(self):
            yield 2, "not an image"

    (tmp_path / "train-0.parquet").touch()
    kind, (fault,) = told(tmp_path)
    assert kind == "pictures in parquet files"
    assert "no validation-*.parquet" in fault
    module = sys.modules["cbam.data.check"]
    monkeypatch.setattr(module, "parquet_rows", lambda root: (Rows("train"), Rows("validation")))
    assert told(tmp_path)[1] == ["train row 2: not an image", "validation row 2: not an image"]
    deep = told(tmp_path, deep=True)[1]
    assert [fault.partition(":")[0] for fault in deep] == [
        *("train row 1", "train row 2"),
        *("validation row 1", "validation row 2"),
    ]
