"""Images with boxes, in VOC, COCO or CSV form."""

import json

import pytest

from cbam.data import annotated
from cbam.errors import DataError

Image = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow")

VOC = "<annotation><filename>{name}</filename>{objects}</annotation>"
OBJECT = (
    "<object><name>{label}</name><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax>"
    "</bndbox></object>"
)


def draw(path):
    Image.new("RGB", (64, 80)).save(path)


def found(images):
    """(file, label, boxes) of every image and class, and the notes without their positions."""
    rows = []
    for index, picture in enumerate(images.pictures):
        sample = images[index]
        for k in images.labels(index):
            boxes = sample["boxes"][(sample["labels"] == k) & ~sample["crowd"]].tolist()
            name = picture.path.replace("\\", "/").rpartition("/")[2]
            rows.append((name, images.classes[k - 1], [tuple(box) for box in boxes]))
    return sorted(rows), [note.partition("; the first")[0] for note in images.notes]


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        draw(tmp_path / name)
    return tmp_path


def voc(folder, stem, *objects):
    text = "".join(OBJECT.format(*box, label=label) for label, box in objects)
    (folder / f"{stem}.xml").write_text(VOC.format(name=f"{stem}.jpg", objects=text))


def coco(folder, **changes):
    content = {
        "images": [{"id": 0, "file_name": "a.jpg"}, {"id": 7, "file_name": "b.jpg"}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 40], "area": 9, "iscrowd": 0}
        ],
    }
    (folder / "boxes.json").write_text(json.dumps(content | changes))
    return folder / "boxes.json"


def test_voc_counts_from_1_and_includes_the_last_pixel(pictures):
    voc(pictures, "a", ("cat", (1, 1, 10, 20)), ("dog", (5, 6, 7, 8)), ("cat", (2.5, 3, 4, 5)))
    assert found(annotated(pictures)) == (
        [("a.jpg", "cat", [(0, 0, 10, 20), (1.5, 2, 4, 5)]), ("a.jpg", "dog", [(4, 5, 7, 8)])],
        [],
    )


def test_voc_is_also_read_from_annotations_and_jpegimages(tmp_path):
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / name).mkdir()
    draw(tmp_path / "JPEGImages" / "a.jpg")
    voc(tmp_path / "Annotations", "a", ("cat", (1, 1, 2, 2)))
    (one,) = annotated(tmp_path).pictures
    assert one.path == str(tmp_path / "JPEGImages" / "a.jpg")


def test_a_voc_file_is_matched_to_its_image_by_filename_or_own_name(pictures):
    voc(pictures, "x", ("cat", (1, 1, 2, 2)))
    text = (pictures / "x.xml").read_text()
    (pictures / "x.xml").write_text(text.replace("x.jpg", "elsewhere/b.jpg"))
    voc(pictures, "a", ("cat", (1, 1, 2, 2)))
    (pictures / "a.xml").write_text((pictures / "a.xml").read_text().replace("a.jpg", "a.png"))
    assert [name for name, _, _ in found(annotated(pictures))[0]] == ["a.jpg", "b.jpg"]


def test_coco_and_csv_give_the_same_box(pictures):
    table = pictures / "boxes.csv"
    table.write_text("file,x0,y0,x1,y1,label\nb.jpg,10,20,40,60,cat\n")
    assert found(annotated(coco(pictures))) == found(annotated(table))
    assert found(annotated(table)) == ([("b.jpg", "cat", [(10, 20, 40, 60)])], [])


def test_a_label_of_a_csv_is_printable(pictures):  # D16
    (pictures / "boxes.csv").write_text('file,x0,y0,x1,y1,label\na.jpg,1,2,3,4,"big\ncat"\n')
    assert annotated(pictures / "boxes.csv").classes == [r"big\ncat"]


def test_images_may_be_in_a_folder_images_next_to_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    draw(tmp_path / "images" / "b.jpg")
    images = annotated(coco(tmp_path))
    assert images.pictures[0].path == str(tmp_path / "images" / "b.jpg")
    assert images.notes[0].startswith("once: an image is missing: left out; the first: ")
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\nb.jpg,1,2,3,4\n")
    assert found(annotated(tmp_path / "boxes.csv"))[0] == [("b.jpg", "", [(1, 2, 3, 4)])]


def test_degenerate_boxes_and_missing_images_are_counted(pictures):  # D25
    voc(pictures, "a", ("cat", (5, 5, 4, 9)), ("cat", (1, 1, 3, 3)))
    voc(pictures, "none", ("cat", (1, 1, 3, 3)))
    rows, notes = found(annotated(pictures))
    assert rows == [("a.jpg", "cat", [(0, 0, 3, 3)])]
    assert notes == [
        "once: a box has no width or no height: dropped",
        "once: an image is missing: left out",
    ]
    table = pictures / "boxes.csv"
    table.write_text("file,x0,y0,x1,y1\na.jpg,5,5,5,9\nnone.jpg,1,2,3,4\na.jpg,-3,0,9,9\n")
    rows, notes = found(annotated(table))
    assert rows == [("a.jpg", "", [(0, 0, 9, 9)])]
    assert len(notes) == 3


@pytest.mark.parametrize("form", ["xml", "json", "csv"])
def test_an_impossible_file_name_counts_as_a_missing_image(pictures, form):
    long = f"{'x' * 400}.jpg"
    table = "file, x0, y0, x1, y1\na.jpg, 1, 2, 3, 4\n"
    if form == "xml":
        voc(pictures, "a", ("cat", (1, 1, 10, 20)))
        (pictures / "b.xml").write_text(VOC.format(name=long, objects=""))
        (pictures / "b.jpg").unlink()
    elif form == "json":
        coco(pictures, images=[{"id": 1, "file_name": f"in/{long}"}, {"id": 7, "file_name": "b.jpg"}])
    else:
        (pictures / "boxes.csv").write_text(f"{table}{long}, 1, 2, 3, 4\n")
    images = annotated(pictures if form == "xml" else pictures / f"boxes.{form}")
    assert len(images) == 1
    assert "an image is missing: left out" in images.notes[0]


def test_crowds_are_not_objects_of_a_class(pictures):
    notes = [
        {"id": i, "image_id": 7, "category_id": 3, "bbox": [1 + i, 2, 3, 4], "iscrowd": i} for i in (0, 1)
    ]
    assert found(annotated(coco(pictures, annotations=notes)))[0] == [("b.jpg", "cat", [(1, 2, 4, 6)])]


def test_coco_boxes_turn_with_the_image_and_csv_boxes_are_for_the_upright_image(tmp_path):  # D6
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right: stored as 64 x 80, shown as 80 x 64
    Image.new("RGB", (64, 80)).save(tmp_path / "a.jpg", exif=exif)
    box = {"id": 1, "image_id": 0, "category_id": 3, "bbox": [10, 20, 30, 40]}
    images = [{"id": 0, "file_name": "a.jpg", "width": 64, "height": 80}]
    rows, _ = found(annotated(coco(tmp_path, images=images, annotations=[box])))
    assert rows == [("a.jpg", "cat", [(20, 10, 60, 40)])]
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\na.jpg,10,20,40,60\n")
    assert found(annotated(tmp_path / "boxes.csv"))[0] == [("a.jpg", "", [(10, 20, 40, 60)])]


def test_a_document_type_is_refused_before_entities_are_expanded(pictures):  # D32
    bomb = "<!DOCTYPE a [<!ENTITY b 'bbbbbbbbbb'><!ENTITY c '&b;&b;&b;&b;&b;&b;'>]><a>&c;&c;&c;</a>"
    outside = "<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/hostname'>]><a>&b;</a>"
    for text in (bomb, outside):
        (pictures / "a.xml").write_text(text)
        with pytest.raises(DataError, match=r"a\.xml line 1: a document type"):
            annotated(pictures)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", "<annotation>", r"a\.xml line 1 column \d+: "),
        ("a.xml", VOC.format(name="a.jpg", objects="<object><name>cat</name></object>"), "has no bndbox"),
        ("a.xml", VOC.format(name="a.jpg", objects="<object/>"), "an object without a name"),
        ("a.xml", VOC.format(name="a.jpg", objects=""), "no image with a box"),
        ("a.json", '{"images": [', "line 1 column 13: the file is truncated"),
        ("a.json", "[]", "expected an object"),
        ("a.json", '{"images": []}', "no 'annotations'"),
        ("a.csv", "file,x0,y0,x1,y1\na.jpg,1,2,3\n", "line 2: no y1"),
        ("a.csv", "file,x0,y0,x1,y1\na.jpg,1,2,3,many\n", "line 2: could not convert"),
        ("a.csv", "file,x0,y0,x1,y1\na.jpg,1,2,nan,4\n", "line 2: a box is not finite"),
        ("a.csv", "file,x0,y0,x1,y1\n\na.jpg,1,2,nan,4\n", "line 3: a box is not finite"),
        ("a.csv", f"file,x0,y0,x1,y1\n{'a' * 200_000},1,2,3,4\n", r"a\.csv: field larger than"),
        ("a.csv", "", "no image with a box"),
        ("a.csv", "file,x0,y0,x1,y1\nnone.jpg,1,2,3,4\n", "an image is missing"),
        ("a.txt", "", "expected a folder of VOC XML, a COCO"),
    ],
)  # D21 D26
def test_an_unreadable_file_is_refused_with_the_position_of_the_fault(pictures, name, content, message):
    (pictures / name).write_text(content)
    with pytest.raises(DataError, match=message):
        annotated(pictures if name.endswith(".xml") else pictures / name)
    with pytest.raises(DataError, match="no such file or folder"):
        annotated(pictures / "none")


@pytest.mark.parametrize("name", ["a\N{LINE SEPARATOR}b.jpg", "a\x1cb.jpg"])
def test_unicode_line_separators_are_part_of_a_file_name(tmp_path, name):  # D16
    draw(tmp_path / name)
    (tmp_path / "a.csv").write_text(f"file,x0,y0,x1,y1,label\n{name},1,2,3,4,cat\n")
    assert found(annotated(tmp_path / "a.csv")) == ([(name, "cat", [(1, 2, 3, 4)])], [])


def test_an_annotation_of_an_unknown_image_or_with_a_bad_box_is_named(pictures):  # D29
    notes = [{"id": 5, "image_id": 99, "category_id": 3, "bbox": [1, 2, 3, 4]}]
    with pytest.raises(DataError, match="image_id 99 of annotation 5 is not among the file's images"):
        annotated(coco(pictures, annotations=notes))
    notes = [{"id": 5, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3]}]
    with pytest.raises(DataError, match=r"annotation 5: bbox is .* expected four finite numbers"):
        annotated(coco(pictures, annotations=notes))


@pytest.mark.parametrize("name", [None, 3, "", "a\0.jpg"])
def test_an_image_with_an_invalid_file_name_is_named(pictures, name):  # D21
    with pytest.raises(DataError, match=r"image 4 has the file_name .*, expected text"):
        annotated(coco(pictures, images=[{"id": 4, "file_name": name}, {"id": 7, "file_name": "b.jpg"}]))


def test_a_missing_size_is_read_from_the_image_file(pictures):
    images = annotated(coco(pictures))
    assert [(picture.width, picture.height) for picture in images.pictures] == [(64, 80)] * 2
    (pictures / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="image 0 has height None"):
        annotated(coco(pictures))


def test_real_annotations_are_read(shared_data, tmp_path):
    import zipfile

    with zipfile.ZipFile(shared_data / "bccd.zip") as archive:
        archive.extractall(tmp_path)
    images = annotated(tmp_path / "bccd")
    assert len(images) == 364
    assert set(images.classes) == {"RBC", "WBC", "Platelets"}
    kept = sum(images.count(i) for i in range(len(images)))
    assert kept + sum(int(note.split()[0]) for note in images.notes if "dropped" in note) == 4888
    assert kept > 4800
