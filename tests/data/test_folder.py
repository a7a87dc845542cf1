import gc
import logging
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cbam.data import decode, image_folder, loader
from cbam.data.folder import _Files
from cbam.data.images import draws
from cbam.data.pictures import augment, centre, random_crop
from cbam.data.scan import find_images
from cbam.errors import DataError, InputError


@pytest.fixture
def split_folder(make_folder):
    """train: 5 cats and 6 dogs; val: 2 and 3."""
    make_folder({"cat": 5, "dog": 6}, inside="train")
    return make_folder({"cat": 2, "dog": 3}, inside="val")


def test_the_folders_train_and_val_give_the_two_sets(split_folder):
    train, val = image_folder(split_folder)
    assert (len(train), len(val)) == (11, 5)
    assert train.classes == val.classes == ["cat", "dog"]
    assert val.targets == [0, 0, 1, 1, 1]
    assert train.name == "pictures"
    sample = train[3]
    assert sample["image"].shape == (3, 32, 32)
    assert sample["image"].dtype == torch.uint8
    assert (sample["target"], sample["index"]) == (0, 3)
    assert sample["box"].isnan().all()
    assert not train.has_boxes


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test", "Val"])
def test_the_validation_folder_may_have_several_names(make_folder, name):
    make_folder({"a": 2, "b": 2}, inside="train")
    train, val = image_folder(make_folder({"a": 1, "b": 1}, inside=name))
    assert (len(train), len(val)) == (4, 2)


def test_exif_false_keeps_images_as_stored(make_folder, encoded, pixels):  # D6
    root = make_folder({"a": 6, "b": 6})
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = root / "a" / "0.jpg"
    path.write_bytes(encoded(pixels(32, 40), "JPEG"))
    plain = image_folder(root)[1][0]["image"]
    path.write_bytes(encoded(pixels(32, 40), "JPEG", exif=exif))
    assert torch.equal(image_folder(root, exif=False)[1][0]["image"], plain)
    assert not torch.equal(image_folder(root)[1][0]["image"], plain)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_reading_many_file_names_does_not_grow_a_workers_memory():
    names = [f"/data/imagenet/train/n{i % 1000:08}/n{i:08}_ünï.JPEG" for i in range(100_000)]
    source = _Files({"a": names[:70_000], "b": names[70_000:]}, "training")
    assert [source.name(i) for i in (0, 69_999, 99_999)] == [names[i] for i in (0, 69_999, 99_999)]
    gc.freeze()  # pages that the collector writes to do not count
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        before = _own_kilobytes()
        for index in range(len(names)):
            source.name(index)
        os.write(writer, str(_own_kilobytes() - before).encode())
        os._exit(0)
    os.waitpid(worker, 0)
    gc.unfreeze()
    grown = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    assert grown < 3000  # 12,700 as a list of strings


def _own_kilobytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def test_a_test_folder_next_to_val_is_not_read_and_noted(split_folder, make_folder):
    train, val = image_folder(make_folder({"cat": 9}, inside="test"))
    assert len(train) + len(val) == 16
    assert "not read: test" in train.notes


@pytest.mark.parametrize("names", [("train", "dev"), ("training", "validation"), ("Val", "all")])
def test_splits_with_other_names_are_not_read_as_classes(make_folder, names):
    for name in names:
        root = make_folder({"cat": 4, "dog": 4}, inside=name)
    with pytest.raises(DataError, match=f"{names[0]} holds only folders.*; name the two train and val, "):
        image_folder(root)


def test_a_class_may_be_named_like_a_split(make_folder):
    make_folder({"old": 3}, inside="car")
    train, val = image_folder(make_folder({"train": 5, "bus": 5}))
    assert (train.classes, len(val)) == (["bus", "car", "train"], 3)


def test_one_folder_of_classes_is_split_by_the_stated_rule(make_folder):
    """By name: 0, 1, 10, 2, 3, 4, 5, ..."""
    root = make_folder({"a": 11, "b": 2})
    train, val = image_folder(root)
    trained, validated = (
        [images._source.name(index) for index in range(len(images))] for images in (train, val)
    )
    ends = [name.rsplit("pictures")[1] for name in validated]
    assert ends == ["/a/0.jpg", "/a/4.jpg", "/a/9.jpg", "/b/0.jpg"]
    assert sorted(trained + validated) == sorted(str(p) for p in root.rglob("*.jpg"))
    assert any("1st, 6th, 11th" in note for note in train.notes)


def test_a_class_of_one_image_cannot_be_split(make_folder):
    with pytest.raises(DataError, match="only one image in class b"):
        image_folder(make_folder({"a": 5, "b": 1}))


@pytest.mark.parametrize("name", ["pictures", "train"])
def test_a_single_nested_folder_is_entered(split_folder, tmp_path, name):
    outer = tmp_path / "outer"
    outer.mkdir()
    if name == "train":
        (split_folder / "train").rename(outer / "train")
        assert sum(map(len, image_folder(outer))) == 11
    else:
        split_folder.rename(outer / name)
        assert list(map(len, image_folder(outer))) == [11, 5]


# random augmentation


def test_a_training_sample_is_a_function_of_seed_epoch_and_index(split_folder):
    train, _ = image_folder(split_folder)
    image = train[(3, 2)]["image"]
    torch.manual_seed(1)
    np.random.seed(1)
    again, _ = image_folder(split_folder)
    assert torch.equal(again[(3, 2)]["image"], image)
    assert not torch.equal(train[(4, 2)]["image"], image)
    assert not torch.equal(train.seeded(1)[(3, 2)]["image"], image)
    assert torch.equal(train[2]["image"], train[(0, 2)]["image"])


def test_a_validation_sample_depends_only_on_its_index(split_folder):
    _, val = image_folder(split_folder)
    assert torch.equal(val[(7, 1)]["image"], val.seeded(5)[1]["image"])


def test_validation_takes_the_centre_after_resizing(encoded):
    """Left, middle and right third of a wide image; 224/256 of the short side is kept."""
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, :64, 0], wide[:, 64:128, 1], wide[:, 128:, 2] = 255, 255, 255
    image = centre(decode(encoded(wide)), 32, 37)
    assert image.shape == (3, 32, 32)
    assert (image[1] == 255).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (3, 2000), (500, 300)])
def test_images_of_any_shape_become_square(shape):  # D11
    picture = torch.full((3, *shape), 77, dtype=torch.uint8)
    start = time.perf_counter()
    for image in (centre(picture, 224, 256), augment(picture, 224, draws("augmentation", 0))):
        assert image.shape == (3, 224, 224)
        assert image.dtype == torch.uint8
        assert (image == 77).all()
    assert time.perf_counter() - start < 5


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_a_random_crop_lies_inside_the_image(height, width, seed):
    top, left, h, w = random_crop(height, width, draws("augmentation", seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert min(h, w) >= 1


def test_random_crops_are_distributed_like_those_of_torchvision():
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    theirs = RandomResizedCrop(224)
    blank = torch.empty(3, 300, 400)
    a = np.array([random_crop(300, 400, draws("augmentation", i)) for i in range(3000)])
    b = [theirs.make_params([blank]) for _ in range(3000)]
    b = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in b])
    spread = b.std(0) * (2 / 3000) ** 0.5
    assert (np.abs(a.mean(0) - b.mean(0)) < 4 * spread).all()
    assert np.allclose(a.std(0), b.std(0), rtol=0.08)


def test_half_of_the_training_images_are_flipped():
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8)
    picture[:] = torch.arange(40, dtype=torch.uint8) * 6
    rising = [
        bool(i[0, 16, 0] < i[0, 16, -1])
        for i in (augment(picture, 32, draws("augmentation", k)) for k in range(400))
    ]
    assert 150 < sum(rising) < 250


# the network's input


@pytest.mark.parametrize(
    ("side", "size"), [(20, 32), (28, 32), (96, 96), (100, 96), (130, 128), (223, 224), (600, 224)]
)
def test_the_input_size_follows_the_images(make_folder, side, size):
    train, val = image_folder(make_folder({"a": 2, "b": 2}, side=side))
    assert (train.size, val.size) == (size, size)
    assert any(f"{size} x {size} pixels" in note for note in train.notes)
    assert val[0]["image"].shape == (3, size, size)


def test_the_input_size_can_be_given(make_folder):
    train, _ = image_folder(make_folder({"a": 2, "b": 2}), size=48)
    assert train[0]["image"].shape == (3, 48, 48)


@pytest.mark.parametrize("size", [0, -1, 7, 5000, 3.5, True, "64"])
def test_an_invalid_size_is_refused(make_folder, size):
    with pytest.raises(InputError, match="size must be an integer from 8 to 4096"):
        image_folder(make_folder({"a": 2, "b": 2}), size=size)


# unreadable images


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_an_unreadable_training_image_is_named_once_and_replaced_by_the_next_of_its_class(
    split_folder, caplog
):  # D1
    plain, _ = image_folder(split_folder)
    cut(split_folder / "train/cat/4.jpg")
    train, _ = image_folder(split_folder)
    assert train.unreadable == []
    with caplog.at_level(logging.WARNING, "cbam"):
        samples = [train[(epoch, 4)] for epoch in range(3)]
    assert [s["target"] for s in samples] == [0, 0, 0]
    assert len(caplog.records) == 1
    assert f"{split_folder}/train/cat/4.jpg (class cat, index 4)" in caplog.text
    assert train.unreadable == [f"{split_folder}/train/cat/4.jpg"]
    following = plain._picture(0)  # after the last of a class comes its first
    assert torch.equal(samples[1]["image"], augment(following, 32, draws("augmentation", 0, 1, 4)))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_raise_with_any_number_of_workers(split_folder, workers):  # D1
    for i in range(2):
        cut(split_folder / f"train/cat/{i}.jpg")
    train, _ = image_folder(split_folder)
    with pytest.raises(DataError) as error:
        list(loader(train, 2, train=True, workers=workers))
    assert str(error.value).startswith("2 of 11 training images cannot be read, 1 allowed; the last: ")
    assert "\n" not in str(error.value)


def test_unreadable_images_found_by_workers_are_counted_in_the_main_process(split_folder):  # D1
    cut(split_folder / "train/cat/1.jpg")
    cut(split_folder / "train/dog/1.jpg")
    train, _ = image_folder(split_folder, unreadable=2)
    here, there = [torch.cat([b["image"] for b in loader(train, 2, train=True, workers=w)]) for w in (0, 2)]
    assert torch.equal(here, there)
    fresh, _ = image_folder(split_folder, unreadable=2)
    assert sum(len(b["index"]) for b in loader(fresh, 4, train=True, workers=2)) == 11
    assert [p[-9:] for p in fresh.unreadable] == ["cat/1.jpg", "dog/1.jpg"]


def test_files_that_are_not_images_are_found_before_the_run_starts(split_folder, caplog):  # D1, D3
    (split_folder / "train/cat/1.jpg").write_bytes(b"<html>")
    train, _ = image_folder(split_folder)
    assert "not an image (starts with '<html')" in caplog.text
    assert len(train.unreadable) == 1
    (split_folder / "train/dog/1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="2 of 11 training images cannot be read, 1 allowed"):
        image_folder(split_folder)
    with pytest.raises(DataError, match="1 of 11 training images cannot be read, 0 allowed"):
        image_folder(split_folder, unreadable=0)


def test_a_class_without_a_readable_image_is_an_error(split_folder):  # D1
    for i in range(5):
        cut(split_folder / f"train/cat/{i}.jpg")
    train, _ = image_folder(split_folder, unreadable=100)
    with pytest.raises(DataError, match="class cat has no readable image"):
        train[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_validation_image_is_an_error(split_folder, workers):  # D1
    cut(split_folder / "val/dog/1.jpg")
    _, val = image_folder(split_folder)
    with pytest.raises(DataError, match=r"^\S*/val/dog/1.jpg \(class dog, index 3\): damaged"):
        list(loader(val, 2, train=False, workers=workers))
    (split_folder / "val/dog/1.jpg").write_bytes(b"")
    message = r"1 of \d+ validation images cannot be read; the first: .*empty file"
    with pytest.raises(DataError, match=message):
        image_folder(split_folder)


def test_a_vanished_file_counts_as_unreadable(split_folder):  # D15
    train, val = image_folder(split_folder)
    (split_folder / "train/cat/0.jpg").unlink()
    (split_folder / "val/cat/0.jpg").unlink()
    assert train[0]["target"] == 0
    assert len(train.unreadable) == 1
    with pytest.raises(DataError, match=r"val/cat/0.jpg .*: No such file"):
        val[0]


def test_reading_is_retried_after_an_io_error(split_folder, monkeypatch):  # D15
    train, val = image_folder(split_folder)
    expected = val[0]["image"]
    from cbam.data import folder

    tries, read = [], folder.read

    def late(path):
        tries.append(path)
        if len(tries) < 3:
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(folder, "read", late)
    assert torch.equal(val[0]["image"], expected)
    assert len(tries) == 3
    assert train.unreadable == []


# invalid folders


def test_an_empty_class_folder_is_named(split_folder):  # D12
    (split_folder / "train/bird").mkdir()
    (split_folder / "val/bird").mkdir()
    with pytest.raises(DataError, match="train: no images in class bird; fill the folder or remove it"):
        image_folder(split_folder)


def test_a_folder_without_images_lists_what_it_holds(tmp_path):  # D13
    with pytest.raises(DataError, match=r"no images in class folders .* it holds no files"):
        image_folder(tmp_path)
    (tmp_path / "docs").mkdir()
    for i in range(7):
        (tmp_path / "docs" / f"{i}.txt").write_text("text")
    with pytest.raises(DataError) as error:
        image_folder(tmp_path)
    assert "docs/4.txt" in str(error.value)
    assert "docs/5.txt" not in str(error.value)


def test_images_without_class_folders_are_refused(make_folder):  # D13
    with pytest.raises(DataError, match=r"no images in class folders .* the first files there: \S*/a/0.jpg"):
        image_folder(make_folder({"a": 3}) / "a")


def test_one_class_only_is_refused(make_folder):
    with pytest.raises(DataError, match=r"only one class \(a\); expected two or more"):
        image_folder(make_folder({"a": 3}))


def test_different_classes_in_train_and_val_are_named(make_folder):  # D14
    make_folder({"a": 2, "b": 2, "c": 2}, inside="train")
    root = make_folder({"a": 2, "d": 2}, inside="val")
    with pytest.raises(DataError, match="only in training: b, c; only in validation: d"):
        image_folder(root)


def test_a_missing_path_and_a_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        image_folder(tmp_path / "none")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"a.zip: a file; .*unpack"):
        image_folder(tmp_path / "a.zip")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_impossible_paths_raise_data_errors(path):
    with pytest.raises(DataError):
        image_folder(path)
    with pytest.raises(DataError):
        decode(path)


@pytest.mark.parametrize("path", [None, 3, b"pictures"])
def test_an_argument_that_is_not_a_path_is_refused(path):
    with pytest.raises(InputError, match="image_folder takes the path of a folder"):
        image_folder(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_read_permission_is_named(split_folder):  # D15
    (split_folder / "train/cat").chmod(0)
    try:
        with pytest.raises(DataError, match="train/cat: Permission denied"):
            image_folder(split_folder)
    finally:
        (split_folder / "train/cat").chmod(0o755)


@pytest.mark.parametrize("name", ["größe 😀", "line\nbreak", "a b", "ünï"])
def test_odd_names_are_read_and_shown_on_one_line(split_folder, name):  # D16
    for split in ("train", "val"):
        (split_folder / split / "cat").rename(split_folder / split / name)
    (split_folder / "val" / name / "0.jpg").rename(split_folder / "val" / name / "x\ny 😀.jpg")
    train, val = image_folder(split_folder)
    assert len(val) == 5
    assert all(c.isprintable() for c in train.classes)
    assert [val[i]["target"] for i in range(5)] == val.targets


def test_undecodable_names_are_read_and_escaped(split_folder):  # D16
    for split in (b"train", b"val"):
        root = os.fsencode(split_folder) + b"/" + split
        os.rename(root + b"/cat", root + b"/c\xff")  # noqa: PTH104 - the names are bytes
    train, val = image_folder(split_folder)
    assert train.classes == [r"c\udcff", "dog"]
    train.classes[0].encode()
    assert len([train[i] for i in range(len(train))]) == 11
    assert len([val[i] for i in range(len(val))]) == 5


def test_link_loops_end_and_are_counted(split_folder):  # D17
    cat = split_folder / "train/cat"
    (cat / "again").symlink_to(cat, target_is_directory=True)
    (cat / "itself").symlink_to(cat / "itself")
    (cat / "up").symlink_to(split_folder, target_is_directory=True)
    (split_folder / "train/round").symlink_to(split_folder / "train/round")
    train, _ = image_folder(split_folder)
    assert train.targets.count(0) == 5 + 6 + 5, "each real folder once: its own, dogs and val"
    assert any("link to a folder already read" in note for note in train.notes)


def test_images_are_found_without_a_stat_for_each(make_folder, monkeypatch):
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: asked.append(Path(path).name) or stat(path, **how))
    root = make_folder({"a": 30, "b": 30})
    asked.clear()
    find_images(root)
    assert {"a", "b"} <= set(asked), "folders are, so the patch works"
    assert [name for name in asked if name.endswith(".jpg")] == []


def test_broken_links_are_counted_and_valid_ones_followed(split_folder):  # D17
    cat = split_folder / "train/cat"
    (cat / "gone.jpg").symlink_to(cat / "nowhere.jpg")
    (cat / "itself.jpg").symlink_to(cat / "itself.jpg")
    (cat / "linked.jpg").symlink_to(split_folder / "train/cat/0.jpg")
    train, _ = image_folder(split_folder)
    assert train.targets.count(0) == 6
    assert any("2 broken link" in note for note in train.notes)


def test_hidden_and_other_files_are_left_out_and_counted(split_folder):  # D18
    cat = split_folder / "train/cat"
    for name in ("._0.jpg", ".DS_Store", "Thumbs.db", "readme.txt"):
        (cat / name).write_bytes(b"x")
    (split_folder / "train/list.csv").write_text("x")
    (split_folder / "train/.ipynb_checkpoints").mkdir()
    train, _ = image_folder(split_folder)
    assert len(train) == 11
    assert (
        "train: left out 3 hidden, 1 not in a class folder, 1 with ending .db, 1 with ending .txt"
        in train.notes
    )


@pytest.mark.parametrize("ending", ["JPG", "JPEG", "Jpeg", "png"])
def test_file_name_extensions_may_be_upper_case(make_folder, ending):  # D10, D18
    train, val = image_folder(make_folder({"a": 2, "b": 2}, ending=ending))
    assert len(train) + len(val) == 4
    assert train[0]["image"].shape == (3, 32, 32)


def test_subfolders_of_a_class_belong_to_it(split_folder):
    inner = split_folder / "train/cat/indoors"
    inner.mkdir()
    (split_folder / "train/cat/0.jpg").rename(inner / "0.jpg")
    train, _ = image_folder(split_folder)
    assert train.targets.count(0) == 5


def test_the_image_files_are_not_changed(split_folder):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in split_folder.rglob("*.jpg")}
    train, val = image_folder(split_folder)
    list(loader(train, 4, train=True))
    list(loader(val, 4, train=False))
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in split_folder.rglob("*.jpg")} == before


def test_a_pickled_set_shares_its_count_of_unreadable_images(split_folder):  # D1
    """Pickled as a spawned worker gets it; the forked ones are tested above."""
    from multiprocessing.reduction import ForkingPickler

    (split_folder / "train/cat/1.jpg").write_bytes(b"\xff\xd8\xff")
    train, _ = image_folder(split_folder)
    there = pickle.loads(ForkingPickler.dumps(train.seeded(1)))
    assert train.unreadable == []
    assert there[1]["target"] == 0
    assert train.unreadable == [f"{split_folder}/train/cat/1.jpg"]


def test_real_photographs_are_read(imagenette):
    train, val = image_folder(imagenette)
    assert len(train.classes) == 10
    assert train.size == 96
    batch = next(iter(loader(train.subset(64), 64, train=True)))
    assert batch["image"].shape[1:] == (3, 96, 96)
    mean = batch["image"].float().mean((0, 2, 3)) / 255
    assert (mean - torch.tensor(train.mean)).abs().max() < 0.15
    assert len(val) > 300
