"""What a study is filled with: rows, the networks that they continue from, and usable images."""

import dataclasses
import json

import pytest

from cbam.errors import ConfigError, InputError
from cbam.studies.boxes import BoxedPictures
from cbam.studies.conduct import conduct, find_images, prepare
from cbam.studies.records import Records, same_images
from cbam.studies.study import digits
from cbam.studies.tables import STUDIES
from cbam.studies.tabulate import tables

TINY = {"epochs": 1, "batch_size": 16}


def study(out, name, **changes):
    own = TINY | changes
    return prepare(name, find_images("digits", own), own, out=str(out), device="cpu")


def test_a_limit_on_a_large_set_selects_the_rows_of_the_small_protocol(tmp_path, monkeypatch):
    large = dataclasses.replace(
        STUDIES["channel"], large_from=1000, small=("plain",), large=("plain", "avg", "max"),
        usual=lambda _, train, __: dataclasses.replace(digits(), small=train < 1000),
    )  # fmt: skip
    monkeypatch.setitem(STUDIES, "channel", large)
    assert list(study(tmp_path, "channel").arms) == ["plain", "avg", "max"]
    few = study(tmp_path, "channel", limit=20)
    assert conduct(few, seeds=1) == 0
    (table,) = tables(large, Records(tmp_path, "channel").all().values())
    assert list(table.arms) == list(few.arms) == ["plain"]


def test_a_diverging_trunk_is_trained_once_for_all_its_forks(tmp_path, monkeypatch):
    filling = prepare(
        "start", find_images("digits", {"limit": 20}), TINY | {"limit": 20, "lr": 1e30, "epochs": 2},
        out=str(tmp_path), device="cpu", arms=["forked-plain", "forked-identity"],
    )  # fmt: skip
    trained, fit = [], filling.training._fit
    monkeypatch.setattr(filling.training, "_fit", lambda *given: trained.append(given[1]) or fit(*given))
    assert conduct(filling, seeds=2) == 0
    assert [config["seed"] for config in trained] == [0, 1]
    told = [record["status"] for record in Records(tmp_path, "start").all().values()]
    assert len(told) == 4
    assert all(status.startswith("NonFiniteError: ") for status in told)


def coco_folder(root, *, label=1):
    """A folder in COCO's layout with a training and a validation image, of two classes."""
    image = {"id": 1, "file_name": "a.jpg", "height": 9, "width": 9}
    box = {"id": 1, "image_id": 1, "category_id": label, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
    whole = {
        "images": [image],
        "annotations": [box],
        "categories": [{"id": i, "name": f"x{i}"} for i in (1, 2)],
    }
    (root / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        (root / part).mkdir()
        (root / part / "a.jpg").touch()
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(whole))
    return str(root)


def test_images_with_other_object_labels_count_as_other_images(tmp_path):
    one, same, other = (
        BoxedPictures(coco_folder(tmp_path / str(i) / "own", label=label)).about
        for i, label in enumerate((1, 1, 2))
    )
    assert one["sha256"] == other["sha256"]  # of names and boxes, which older records are identified by
    assert same_images(one, same)
    assert not same_images(one, other)
    assert same_images({name: value for name, value in one.items() if name != "objects"}, other)


def test_an_invalid_number_of_workers_is_refused_before_any_run(tmp_path):
    with pytest.raises(InputError, match="workers must be an integer from 0 to 1024, got -1"):
        prepare("channel", find_images("digits", TINY), TINY, out=str(tmp_path), device="cpu", workers=-1)


def test_a_study_with_vocs_metric_is_refused_on_a_coco_folder(tmp_path):
    coco_folder(tmp_path)
    assert find_images(str(tmp_path), {}, ["coco"]).name == tmp_path.name
    with pytest.raises(ConfigError, match=r"study voc uses Pascal VOC's metric, but .* is in COCO's format"):
        find_images(str(tmp_path), {}, ["coco", "voc"])
