"""COCO files: what is read, what is repaired and counted, what is refused with its position."""

import json
import random
import re

import numpy as np
import pytest
import torch

from cbam.data import coco
from cbam.data.coco import TWICE
from cbam.data.segmentation import mask_fault
from cbam.errors import DataError


def annotation(id, box=(1, 2, 10, 20), image=7, category=3, **more):
    fields = {
        "id": id,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": 99.5,
        "iscrowd": 0,
    }
    return fields | more


@pytest.fixture
def folder(tmp_path, encoded, pixels):
    for name in ("a.jpg", "b.png"):
        kind = "JPEG" if name.endswith("jpg") else "PNG"
        (tmp_path / name).write_bytes(encoded(pixels(48, 64), kind))
    return tmp_path


@pytest.fixture
def write(folder):
    """write(annotations, **replaced lists) -> the arguments of `coco`; a str is the whole file."""

    def file(annotations, **replaced):
        lists = {
            "images": [
                {"id": 7, "file_name": "a.jpg", "height": 48, "width": 64},
                {"id": 9, "file_name": "b.png", "height": 48, "width": 64},
            ],
            "annotations": annotations,
            "categories": [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}],
        }
        text = annotations if isinstance(annotations, str) else json.dumps(lists | replaced, indent=1)
        (folder / "instances.json").write_text(text, encoding="utf-8")
        return folder / "instances.json", folder

    return file


def refusal(arguments):
    with pytest.raises(DataError) as error:
        coco(*arguments)
    return str(error.value)


def line_of(path, text):
    return next(i for i, line in enumerate(path.read_text("utf-8").splitlines(), 1) if text in line)


def test_boxes_labels_and_flags_are_those_of_the_file(write):
    images = coco(*write([annotation(4, image=9, category=5), annotation(2), annotation(3, iscrowd=1)]))
    assert (len(images), images.classes, images.notes) == (2, ["cat", "dog"], [])
    first, second = images[0], images[1]
    assert (first["image_id"], second["image_id"], second["index"]) == (7, 9, 1)
    assert first["image"].shape == (3, 48, 64)
    assert first["image"].dtype == torch.uint8
    assert first["boxes"].tolist() == [[1, 2, 11, 22]] * 2
    assert first["boxes"].dtype == torch.float32
    assert (first["labels"].tolist(), second["labels"].tolist()) == ([1, 1], [2])
    assert (first["crowd"].tolist(), first["difficult"].tolist()) == ([False, True], [False, False])
    assert first["area"].tolist() == [99.5, 99.5]


def test_a_file_truncated_anywhere_is_named_with_line_and_column(write):  # D21
    path, folder = write([annotation(1), annotation(2)])
    text = path.read_text("utf-8")
    for end in range(0, len(text.rstrip()) - 1, 7):
        path.write_text(text[:end], encoding="utf-8")
        told = refusal((path, folder))
        assert told.startswith(f"{path} line ")
        line = int(told.split(" line ")[1].split()[0])
        assert line <= text[:end].count("\n") + 1


def test_the_position_of_a_fault_is_exact(write):  # D21
    told = refusal(write('{"images": [],\n "annotations": [{"id": 1,, "x": 2}]}'))
    assert " line 2 column 27: " in told
    told = refusal(write('{"images": [],\n "annotations": [{"id"'))
    assert told.endswith("line 2 column 23: the file is truncated")


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_a_literal_that_is_not_json_is_refused_with_position_and_id(write, name):  # D21, D26
    path, folder = write([annotation(1), annotation(2, (1, float(name.replace("Infinity", "inf")), 3, 4))])
    line = line_of(path, name)
    told = refusal((path, folder))
    assert told.startswith(f"{path} line {line} column ")
    assert told.endswith("NaN and Infinity are not JSON (annotation 2)")
    told = refusal(write(f'{{"info": {name}}}'))
    assert told.endswith("line 1 column 10: NaN and Infinity are not JSON")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        '{"images": 3',
        "{'a': 1}",
        '{"a": 1}x',
        '{"a": 1, "a": 2}',
        "[" * 9999,
        '{"a":' + "[" * 99999,
    ],
)
def test_a_file_that_is_not_a_json_object_is_refused(write, text):  # D21
    assert " line 1 column " in refusal(write(text))


def test_huge_numbers_are_refused(write):  # D21, D26
    path, folder = write([annotation(6, (1, 2, 3, 12345))])
    for number, told in (
        ("1e999", "annotation 6: bbox is"),
        ("9" * 5000, "line"),
        ("9" * 400, "annotation 6"),
    ):
        path.write_text(path.read_text("utf-8").replace("12345", number), encoding="utf-8")
        assert told in refusal((path, folder))
        path, folder = write([annotation(6, (1, 2, 3, 12345))])


def test_bytes_that_are_not_utf8_are_refused_and_a_byte_order_mark_is_not(write):
    path, folder = write([annotation(1)])
    good = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + good)
    assert len(coco(path, folder)) == 2
    path.write_bytes(b"{\xff" + good)
    assert refusal((path, folder)) == f"{path}: byte 1 is not UTF-8"


def test_missing_area_and_crowd_are_filled_and_counted(write):  # D22
    lacking = [annotation(id) for id in (1, 2, 3)]
    del lacking[0]["area"], lacking[1]["area"], lacking[1]["iscrowd"]
    images = coco(*write(lacking))
    assert images[0]["area"].tolist() == [200, 200, 99.5]
    assert not images[0]["crowd"].any()
    first, second = images.notes
    assert first.startswith("2 times: an annotation has no area: width times height is used; the first: ")
    assert second.startswith("once: an annotation has no iscrowd: 0 is used; the first: ")


def test_null_counts_as_missing_and_true_as_one(write):  # D22
    odd = [annotation(1, iscrowd=True), annotation(2, iscrowd=False), annotation(3, iscrowd=None, area=None)]
    images = coco(*write([*odd, annotation(4, segmentation=[[]])]))
    assert images[0]["crowd"].tolist() == [True, False, False, False]
    assert images[0]["area"].tolist() == [99.5, 99.5, 200, 99.5]
    assert [note[:31] for note in images.notes] == [
        "once: an annotation has no area",
        "once: an annotation has no iscr",
    ]


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_duplicate_id_is_refused(write, key):  # D23
    path, _ = write([annotation(1)])
    lists = json.loads(path.read_text("utf-8"))
    lists[key].append(lists[key][-1])
    told = refusal(write(json.dumps(lists)))
    assert told.endswith(f"duplicate {key[:-1].replace('ie', 'y')} id {lists[key][-1]['id']}")


def test_the_annotation_id_0_is_accepted_and_counted(write):  # D23
    images = coco(*write([annotation(0), annotation(1)]))
    assert images.count(0) == 2
    assert "once: an annotation has the id 0" in images.notes[0]


@pytest.mark.parametrize(
    ("box", "kept", "note"),
    [
        ((-5, 40, 20, 20), [0, 40, 15, 48], "clipped"),  # D24
        ((60, 0, 4.004, 5), [60, 0, 64, 5], ""),  # COCO's own rounding
        ((64, 3, 5, 5), None, "lies outside its image: dropped"),  # D24
        ((-9, 3, 5, 5), None, "lies outside its image: dropped"),  # D24
        ((3, 3, 0, 5), None, "no width or no height: dropped"),  # D25
        ((3, 3, 5, -2), None, "no width or no height: dropped"),  # D25
        ((1e-9, 3, 1e-9, 2), None, "no width or no height: dropped"),  # D25
        ((0, 0, 64, 48), [0, 0, 64, 48], ""),
    ],
)
def test_degenerate_and_outside_boxes_are_dropped_or_clipped(write, box, kept, note):
    images = coco(*write([annotation(1, box), annotation(2, (5, 5, 5, 5), image=9)]))
    assert images[0]["boxes"].tolist() == ([kept] if kept else [])
    assert images[0]["boxes"].shape[1] == 4
    assert [n for n in images.notes if note and note in n] == images.notes
    assert bool(note) == bool(images.notes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bbox": [1, 2, 3]}, "bbox is [1, 2, 3], expected four finite numbers"),
        ({"bbox": [1, 2, 3, "4"]}, "bbox is"),
        ({"bbox": [1, 2, 3, True]}, "bbox is"),
        ({"bbox": None}, "bbox is None"),
        ({"area": -1}, "area is -1"),
        ({"area": "big"}, "area is 'big'"),
        ({"iscrowd": 2}, "iscrowd is 2, expected 0 or 1"),
        ({"iscrowd": "no"}, "iscrowd is 'no'"),
        ({"segmentation": [[1, 2, 3]]}, "a polygon must be a list"),  # D30
        ({"segmentation": [[], [1, 2]]}, "a polygon must be a list"),  # D30
        ({"segmentation": "x"}, "segmentation is a str"),  # D30
        ({"segmentation": {"size": [64, 48], "counts": [3072]}}, "height and width [64, 48]"),  # D30
        ({"segmentation": {"size": [48, 64], "counts": [3071]}}, "runs of 3071 pixels"),  # D30
    ],
)
def test_a_damaged_annotation_is_refused_with_line_and_id(write, change, told):  # D26, D30
    path, folder = write([annotation(1), annotation(17, **change)])
    message = refusal((path, folder))
    assert "annotation 17: " in message
    assert told in message
    assert f" line {line_of(path, '17,') - 1} column 3: " in message


def test_unknown_ids_are_listed(write):  # D29
    told = refusal(write([annotation(1, category=91), annotation(2, image=8), annotation(3, category=91)]))
    assert "category_id 91 of annotation 1, 3 is not among the file's categories" in told
    assert "image_id 8 of annotation 2 is not among the file's images" in told


def test_many_faults_are_counted_and_the_first_reported(write):
    told = refusal(write([annotation(id, bbox=None) for id in range(1, 9)]))
    assert "annotation 3" in told
    assert "annotation 4" not in told
    assert "and 5 more, see `cbam data check" in told


def test_images_without_boxes_are_kept_and_can_be_left_out(write):  # D31
    images = coco(*write([annotation(1, image=9)]))
    assert [len(images[i]["labels"]) for i in range(2)] == [0, 1]
    chosen = images.with_objects()
    assert [(s["image_id"], s["boxes"].tolist()) for s in (chosen[0],)] == [(9, [[1, 2, 11, 22]])]
    assert chosen.notes == ["1 of 2 images without objects left out"]
    assert len(images.subset(1)) == 1


def test_a_file_without_annotations_gives_a_set_without_boxes(write):  # D31
    images = coco(*write([]))
    assert images[0]["boxes"].shape == (0, 4)
    assert len(images.with_objects()) == 0


def test_a_missing_or_broken_image_is_named(write, folder):
    arguments = write([annotation(1)])
    (folder / "b.png").unlink()
    assert refusal(arguments).endswith(f"image 9: {folder / 'b.png'} is missing")
    (folder / "b.png").write_bytes(b"<html>")
    images = coco(*arguments)
    with pytest.raises(DataError, match=r"b\.png \(image 9\): not an image \(starts with '<html'\)"):
        images[1]


def test_an_impossible_file_name_is_reported_as_missing(write, folder):
    (folder / "inner").mkdir()
    name = f"inner/{'x' * 400}.jpg"
    image = {"id": 7, "file_name": name, "height": 48, "width": 64}
    assert refusal(write([annotation(1)], images=[image])).endswith(f"{name} is missing")


def test_an_image_under_two_ids_is_kept_twice_and_counted(write):
    images = [{"id": id, "file_name": "a.jpg", "height": 48, "width": 64} for id in (7, 9)]
    arguments = write([annotation(1), annotation(2, image=9)], images=images)
    found = coco(*arguments)
    assert [len(found[i]["labels"]) for i in range(2)] == [1, 1]
    (note,) = found.notes
    assert note.startswith(f"once: {TWICE}; the first: {arguments[0]} line ")


def test_an_image_of_another_size_than_stated_is_refused(write, folder, encoded, pixels):
    arguments = write([annotation(1)])
    (folder / "a.jpg").write_bytes(encoded(pixels(50, 64), "JPEG"))
    with pytest.raises(DataError, match="64x50 pixels, but its annotation says 64x48"):
        coco(*arguments)[0]


@pytest.mark.parametrize(
    ("lists", "told"),
    [
        ({"images": 3}, "'images' is not a list"),
        ({"images": [3]}, "an element of 'images' has the id None"),
        ({"images": [{"id": "x"}]}, "has the id 'x', expected an integer"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}]}, "image 1 has height None and width None"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 0}]}, "width 0, expected pixels"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "height": 0, "width": 64}]}, "height 0 and width 64"),
        ({"images": [{"id": 1, "height": 4, "width": 4}]}, "image 1 has the file_name None"),
        ({"categories": [{"id": 3}]}, "category 3 has the name None"),
    ],
)
def test_invalid_lists_are_refused(write, lists, told):
    assert told in refusal(write([], **lists))


def test_a_file_that_lacks_a_list_is_refused(write):
    told = refusal(write('{"images": [], "annotations": []}'))
    assert told.endswith("no 'categories'; a COCO file has images, annotations, categories")


# masks


def compressed(runs):
    """The string of COCO's compressed runs."""
    letters = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            letters += chr(bits + 48 + 32 * more)
            if not more:
                break
    return letters


def test_compressed_runs_are_read_like_uncompressed_ones():  # D30
    random_ = np.random.default_rng(0)
    for _ in range(200):
        runs = random_.integers(0, 5000, random_.integers(1, 12)).tolist()
        size = [1, sum(runs)]
        assert mask_fault({"size": size, "counts": compressed(runs)}, *size) == ""
        assert mask_fault({"size": size, "counts": runs}, *size) == ""
        wrong = [runs[0] + 1, *runs[1:]]
        assert mask_fault({"size": size, "counts": compressed(wrong)}, *size)


def test_compressed_runs_of_pycocotools_are_accepted():  # D30
    mask = pytest.importorskip("pycocotools.mask")
    for seed in range(20):
        pixels = np.random.default_rng(seed).random((13, 17)) < 0.3
        encoded = mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
        assert mask_fault({"size": [13, 17], "counts": encoded["counts"].decode()}, 13, 17) == ""


def test_two_thousand_random_masks_are_judged_without_a_crash():  # D30
    dice, judged = random.Random(0), {True: 0, False: 0}
    for _ in range(2000):
        runs = [dice.randrange(40) for _ in range(dice.randrange(1, 9))]
        counts = list(compressed(runs))
        for _ in range(dice.randrange(3)):
            counts[dice.randrange(len(counts))] = chr(dice.randrange(32, 300))
        size = [1, sum(runs)]
        odd = [None, 3, -1, 1e999, "x", [], {}, True, 10**400, [1, 2, 3, 4, 5, "6"], "".join(counts)]
        whole = {"size": size, "counts": "".join(counts)}
        other = {"size": dice.choice(odd), "counts": dice.choice(odd)}
        polygon = [dice.choice(odd) for _ in range(6)]
        mask = dice.choice([whole, whole, other, [polygon], [dice.choice(odd)], dice.choice(odd)])
        fault = mask_fault(mask, *size)
        assert isinstance(fault, str)
        judged[bool(fault)] += 1
    assert min(judged.values()) > 100


@pytest.mark.parametrize("value", [[7], {"id": 7}])
def test_an_image_id_that_is_not_a_number_is_refused_with_its_line(write, value):  # D26
    arguments = write([annotation(1), annotation(2, image=value)])
    assert re.search(
        r"json line \d+ column \d+: image_id .* of annotation 2 is not among", refusal(arguments)
    )
