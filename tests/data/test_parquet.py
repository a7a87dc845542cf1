"""Images in parquet files, as Hugging Face stores ImageNet-1k (rows C5, D1, D3, D14)."""

import json
import sys

import numpy as np
import pytest
import torch

from cbam.data import loader, picture_set
from cbam.data.parquet import TRAIN, VALIDATION, _files
from cbam.errors import DataError, MissingExtraError


@pytest.fixture
def write(tmp_path, encoded, pixels):
    """write("train", [(label, bytes), ...]) writes a split in two files to tmp_path/set/data; None: null."""
    pytest.importorskip("datasets", reason="the extra cbam[parquet] is not installed")
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(split, rows, names=("cat", "dog")):
        folder = tmp_path / "set" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        label = (
            {"names": list(names), "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
        )
        features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        schema = pa.schema(
            [("image", image), ("label", pa.int64())], metadata={"huggingface": json.dumps(features)}
        )
        for number, part in enumerate((rows[::2], rows[1::2])):
            table = pa.table(
                {
                    "image": [data if data is None else {"bytes": data, "path": None} for _, data in part],
                    "label": [label for label, _ in part],
                },
                schema=schema,
            )
            pq.write_table(table, folder / f"{split}-{number:05d}-of-00002.parquet")
        return tmp_path / "set"

    return write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def picture(encoded, pixels):
    return lambda seed=0: encoded(pixels(40, 48, seed), "PNG")


def test_rows_are_loaded_like_the_images_of_a_folder(write, picture):
    write("train", [(i % 2, picture(i)) for i in range(10)])
    root = write("validation", [(1, picture(3)), (0, picture(4))])
    train, val = picture_set(root, size=32)
    assert (train.classes, len(train), len(val)) == (["cat", "dog"], 10, 2)
    assert sorted(train.targets) == [0] * 5 + [1] * 5
    assert val.targets == [1, 0]
    one, two = (
        torch.cat([batch["image"] for batch in loader(train, 4, train=True, seed=1, workers=workers)])
        for workers in (0, 1)
    )
    assert one.shape == (10, 3, 32, 32)
    assert torch.equal(one, two)
    assert picture_set(root)[0].size == 224


def test_labels_are_not_read_row_by_row(write, picture, monkeypatch):
    write("train", [(i % 2, picture(i)) for i in range(6)])
    root = write("validation", [(0, picture()), (1, picture())])
    import datasets

    monkeypatch.setattr(datasets.Dataset, "__iter__", lambda rows: pytest.fail("row by row"))
    assert sorted(picture_set(root, size=32)[0].targets) == [0] * 3 + [1] * 3


def test_a_broken_row_is_replaced_in_training_and_an_error_in_validation(write, picture):  # D1, D3
    write("train", [(0, picture()), (1, picture()), (0, b"<html>"), (1, picture(2))])
    root = write("validation", [(0, picture()), (1, picture())])
    train, _ = picture_set(root, size=32)
    broken = train.unreadable
    assert len(broken) == 1
    assert "train row " in broken[0]
    assert all(train[i]["image"].shape == (3, 32, 32) for i in range(4))
    write("validation", [(0, picture()), (1, b"")])
    with pytest.raises(
        DataError, match=r"validation row 1 \(class dog, index 1\): not an image \(empty file\)"
    ):
        picture_set(root, size=32)


def test_labels_out_of_range_or_without_matching_names_are_refused(write, picture):  # D14
    write("train", [(0, picture()), (2, picture())])
    root = write("validation", [(0, picture()), (1, picture())])
    with pytest.raises(DataError, match="label 2 in row 1, expected 0 to 1"):
        picture_set(root)
    write("train", [(0, picture()), (1, picture())], names=("cat", "cow"))
    with pytest.raises(DataError, match="have different classes"):
        picture_set(root)
    write("train", [(0, picture()), (1, picture())], names=None)
    with pytest.raises(DataError, match="expected the columns image and label"):
        picture_set(root)


def test_a_null_image_is_unreadable_and_a_null_label_refused(write, picture):  # D3, D14
    write("train", [(0, picture()), (1, picture()), (0, None), (1, picture(2))])
    root = write("validation", [(0, picture()), (1, picture())])
    train, _ = picture_set(root, size=32)
    assert len(train.unreadable) == 1
    write("train", [(0, picture()), (None, picture())])
    with pytest.raises(DataError, match="label None in row 1, expected 0 to 1"):
        picture_set(root, size=32)


def test_a_damaged_file_is_a_data_error(write, picture):
    write("train", [(0, picture()), (1, picture())])
    root = write("validation", [(0, picture()), (1, picture())])
    (root / "data" / "train-00000-of-00002.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="parquet files cannot be read"):
        picture_set(root)


def test_a_missing_split_is_named(tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"no validation-\*\.parquet"):
        picture_set(tmp_path)


def test_the_test_split_is_used_only_without_a_validation_split(tmp_path):
    files = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")]
    (tmp_path / "data").mkdir()
    for file in files:
        (tmp_path / file).touch()
    read = {split: _files(tmp_path, names) for split, names in (("train", TRAIN), ("val", VALIDATION))}
    assert read == {"train": [str(tmp_path / files[0])], "val": [str(tmp_path / files[1])]}
    (tmp_path / files[1]).unlink()
    assert _files(tmp_path, VALIDATION) == [str(tmp_path / files[2])]


def test_a_missing_package_is_reported_with_its_pip_command(tmp_path, monkeypatch):  # C5
    for split in ("train", "validation"):
        (tmp_path / f"{split}-0.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cbam\[parquet\]'"):
        picture_set(tmp_path)


def test_a_folder_without_parquet_files_is_read_as_an_image_folder(make_folder):
    train, _ = picture_set(make_folder({"cat": 4, "dog": 4}))
    assert (len(train), np.unique(train.targets).tolist()) == (6, [0, 1])
