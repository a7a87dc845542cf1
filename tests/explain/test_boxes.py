import json

import pytest

from cbam.errors import DataError
from cbam.explain.boxes import read_boxes

VOC = "<annotation><filename>{name}</filename>{objects}</annotation>"
OBJECT = (
    "<object><name>{label}</name><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax>"
    "</bndbox></object>"
)


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"a picture")
    return tmp_path


def voc(folder, stem, *objects):
    text = "".join(OBJECT.format(*box, label=label) for label, box in objects)
    (folder / f"{stem}.xml").write_text(VOC.format(name=f"{stem}.jpg", objects=text))


def coco(folder, **changes):
    content = {
        "images": [{"id": 0, "file_name": "a.jpg"}, {"id": 7, "file_name": "b.jpg"}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 40]}],
    }
    (folder / "boxes.json").write_text(json.dumps(content | changes))
    return folder / "boxes.json"


def test_voc_counts_from_1_and_includes_the_last_pixel(pictures):
    voc(pictures, "a", ("cat", (1, 1, 10, 20)), ("dog", (5, 6, 7, 8)), ("cat", (2.5, 3, 4, 5)))
    found, notes = read_boxes(pictures)
    assert [(one.path.name, one.label, one.boxes) for one in found] == [
        ("a.jpg", "cat", ((0, 0, 10, 20), (1.5, 2, 4, 5))),
        ("a.jpg", "dog", ((4, 5, 7, 8),)),
    ]
    assert notes == []


def test_voc_lies_in_annotations_and_jpegimages_too(tmp_path):
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / name).mkdir()
    (tmp_path / "JPEGImages" / "a.jpg").write_bytes(b"a picture")
    voc(tmp_path / "Annotations", "a", ("cat", (1, 1, 2, 2)))
    (one,), _ = read_boxes(tmp_path)
    assert one.path == tmp_path / "JPEGImages" / "a.jpg"


def test_coco_and_csv_say_the_same_box(pictures):
    table = pictures / "boxes.csv"
    table.write_text("file,x0,y0,x1,y1,label\nb.jpg,10,20,40,60,cat\n")
    assert read_boxes(coco(pictures)) == read_boxes(table)
    (one,), _ = read_boxes(table)
    assert (one.path.name, one.label, one.boxes) == ("b.jpg", "cat", ((10, 20, 40, 60),))


def test_pictures_may_lie_in_images_beside_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.jpg").write_bytes(b"a picture")
    (one,), _ = read_boxes(coco(tmp_path))
    assert one.path == tmp_path / "images" / "b.jpg"


def test_boxes_without_area_and_pictures_that_are_not_there_are_counted(pictures):  # D25
    voc(pictures, "a", ("cat", (5, 5, 4, 9)), ("cat", (1, 1, 3, 3)))
    voc(pictures, "none", ("cat", (1, 1, 3, 3)))
    found, notes = read_boxes(pictures)
    assert [one.boxes for one in found] == [((0, 0, 3, 3),)]
    assert notes == ["1 boxes without area", "1 pictures that are not there"]


def test_a_document_type_is_refused_before_any_entity_grows(pictures):  # D32
    bomb = "<!DOCTYPE a [<!ENTITY b 'bbbbbbbbbb'><!ENTITY c '&b;&b;&b;&b;&b;&b;'>]><a>&c;&c;&c;</a>"
    outside = "<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/hostname'>]><a>&b;</a>"
    for text in (bomb, outside):
        (pictures / "a.xml").write_text(text)
        with pytest.raises(DataError, match=r"a\.xml: it declares a document type"):
            read_boxes(pictures)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", "<annotation>", r"a\.xml: not an XML file"),
        ("a.xml", VOC.format(name="a.jpg", objects="<object/>"), "object 1: no box of four numbers"),
        ("a.xml", VOC.format(name="a.jpg", objects=""), "no picture with a box"),
        ("a.json", '{"images": [', "line 1 column 13"),
        ("a.json", "[]", "it holds a list"),
        ("a.json", '{"images": []}', "'annotations' is missing"),
        ("a.csv", "file,x0,y0,x1,y1\na.jpg,1,2,3\n", "line 2: no y1"),
        ("a.csv", "file,x0,y0,x1,y1\na.jpg,1,2,3,many\n", "line 2: could not convert"),
        ("a.csv", "file,x0,y0,x1,y1\na.jpg,1,2,nan,4\n", "line 2: a box is not finite"),
        ("a.csv", "", "no picture with a box"),
        ("a.csv", "file,x0,y0,x1,y1\nnone.jpg,1,2,3,4\n", "1 pictures that are not there"),
        ("a.txt", "", "expected a folder of VOC XML, a COCO"),
    ],
)  # D21 D26
def test_what_cannot_be_read_is_refused_with_its_place(pictures, name, content, message):
    (pictures / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_boxes(pictures if name.endswith(".xml") else pictures / name)


def test_an_annotation_of_no_image_is_named(pictures):  # D29
    notes = [{"id": 5, "image_id": 99, "category_id": 3, "bbox": [1, 2, 3, 4]}]
    with pytest.raises(DataError, match="annotation 5: there is no image 99"):
        read_boxes(coco(pictures, annotations=notes))
    notes = [{"id": 5, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3]}]
    with pytest.raises(DataError, match="annotation 5: bbox must be four numbers"):
        read_boxes(coco(pictures, annotations=notes))


def test_real_annotations_are_read(shared_data, tmp_path):
    import zipfile

    with zipfile.ZipFile(shared_data / "bccd.zip") as archive:
        archive.extractall(tmp_path)
    found, notes = read_boxes(tmp_path / "bccd")
    assert len({one.path for one in found}) == 364
    assert sum(len(one.boxes) for one in found) > 4800
    assert {one.label for one in found} == {"RBC", "WBC", "Platelets"}
    assert sum(int(note.split()[0]) for note in notes) + sum(len(one.boxes) for one in found) == 4888
