"""VOC folders: what is read, what is repaired and counted, what is refused with its position."""

import math

import pytest
from PIL import Image

from cbam.data import annotated, voc
from cbam.data.voc import parse
from cbam.errors import DataError, InputError

BOX = (11, 6, 30, 20)


def thing(name="cat", box=BOX, difficult="0", extra=""):
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return (
        f"<object>\n<name>{name}</name>{extra}<difficult>{difficult}</difficult>\n"
        f"<bndbox>{sides}</bndbox>\n</object>\n"
    )


def xml(*things, size="<size><width>64</width><height>48</height><depth>3</depth></size>"):
    return f"<annotation>\n{size}\n{''.join(things)}</annotation>\n"


@pytest.fixture
def folder(tmp_path, encoded, pixels):
    """folder(annotations by name, split, inside) writes a VOC folder and returns it."""

    def make(annotations, split="train", inside="voc"):
        root = tmp_path / inside
        for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / part).mkdir(parents=True, exist_ok=True)
        for name, text in annotations.items():
            (root / f"JPEGImages/{name}.jpg").write_bytes(encoded(pixels(48, 64), "JPEG"))
            (root / f"Annotations/{name}.xml").write_text(text, encoding="utf-8")
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(annotations) + "\n", encoding="utf-8")
        return root

    return make


def refusal(*arguments, **more):
    with pytest.raises(DataError) as error:
        voc(*arguments, **more)
    return str(error.value)


def test_boxes_count_pixels_from_one_and_include_their_ends(folder):  # D32
    images = voc(folder({"a": xml(thing(), thing("dog", (1, 1, 64, 48), "1")), "b": xml()}), "train")
    assert (images.name, images.classes, images.notes) == ("voc train", ["cat", "dog"], [])
    first, second = images[0], images[1]
    assert first["boxes"].tolist() == [[10, 5, 30, 20], [0, 0, 64, 48]]
    assert first["labels"].tolist() == [1, 2]
    assert first["area"].tolist() == [300, 64 * 48]
    assert first["difficult"].tolist() == [False, True]
    assert not first["crowd"].any()
    assert (first["image_id"], second["image_id"]) == (1, 2)
    assert second["boxes"].shape == (0, 4)  # D31
    assert images.pictures[0].name == "a"


def test_a_test_set_uses_the_classes_of_its_training_set(folder):
    root = folder({"a": xml(thing("dog"), thing("ant"))})
    folder({"b": xml(thing("dog"))}, "test")
    train = voc(root, "train")
    assert voc(root, "test", classes=train.classes)[0]["labels"].tolist() == [2]
    told = refusal(root, "train", classes=["dog"])
    assert told == f"{root}/Annotations/a.xml line 7: class 'ant' is not one of the classes"


def test_a_class_with_an_invisible_character_is_the_same_in_both_sets(folder):
    root = folder({"a": xml(thing("cat\u200b"))})
    folder({"b": xml(thing("cat\u200b"))}, "val")
    train = voc(root, "train")
    assert train.classes == ["cat\\u200b"]
    for classes in (train.classes, ["cat\u200b"]):
        assert voc(root, "val", classes=classes)[0]["labels"].tolist() == [1]


def test_duplicate_classes_are_refused(folder):
    """It would give labels beyond the list, or labels of other names."""
    root = folder({"a": xml(thing("dog"))})
    with pytest.raises(InputError, match="classes: duplicate 'cat'"):
        voc(root, "train", classes=["cat", "cat", "dog"])


def test_several_folders_give_one_set(folder):
    roots = [folder({"a": xml(thing("dog"))}, inside="one"), folder({"a": xml(thing("cat"))}, inside="two")]
    images = voc(roots, "train")
    assert [images[i]["labels"].tolist() for i in range(2)] == [[2], [1]]
    assert [picture.id for picture in images.pictures] == [1, 2]
    assert images.pictures[1].path.startswith(str(roots[1]))


@pytest.mark.parametrize(
    ("box", "kept", "note"),
    [
        ((10.5, 6.25, 30.75, 20), [9.5, 5.25, 30.75, 20], ""),  # D32
        ((0, 0, 64, 48), [0, 0, 64, 48], ""),
        ((-3, 5, 70, 20), [0, 4, 64, 20], "clipped"),  # D24
        ((65, 5, 80, 20), None, "lies outside its image: dropped"),  # D24
        ((9, 9, 9, 9), None, "no width or no height: dropped"),  # D25
        ((9, 9, 8, 20), None, "no width or no height: dropped"),  # D25
    ],
)
def test_fractional_boxes_are_kept_and_bad_ones_dropped_or_clipped(folder, box, kept, note):
    root = folder({"a": xml(thing(), thing(box=box))})
    images = voc(root, "train")
    boxes = images[0]["boxes"].tolist()
    assert boxes[1:] == ([kept] if kept else [])
    if note:
        assert images.notes[0].startswith("once: a box ")
        assert note in images.notes[0]
        assert images.notes[0].endswith(f"{root}/Annotations/a.xml line 9")
    else:
        assert images.notes == []


BILLION = """<?xml version="1.0"?>
<!DOCTYPE annotation [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;"><!ENTITY d "&c;&c;&c;&c;&c;&c;&c;&c;&c;&c;">]>
<annotation>&d;</annotation>"""
EXTERNAL = """<?xml version="1.0"?>
<!DOCTYPE annotation [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotation>&x;</annotation>"""
REMOTE = '<!DOCTYPE annotation SYSTEM "http://localhost:1/x.dtd"><annotation/>'


@pytest.mark.parametrize("text", [BILLION, EXTERNAL, REMOTE])
def test_a_document_type_is_refused_before_an_entity_is_read(folder, text):  # D32
    told = refusal(folder({"a": text}), "train")
    line = 1 if text is REMOTE else 2
    assert f"a.xml line {line}: a document type; VOC files have none" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "a.xml line 1 column 1: no element found"),
        (xml(thing())[:-20], "a.xml line 6 column 1: unclosed token"),
        ("<annotation>\n<a></b></annotation>", "a.xml line 2 column 6: mismatched tag"),
        ("<annotation>&nbsp;</annotation>", "undefined entity"),
        ("<html><body>404</body></html>", "a.xml line 1: expected <annotation>, found <html>"),
        (
            "<?xml version='1.0' encoding='shift_jis'?><annotation/>",
            "line 1: encoding: multi",
        ),
        (
            "<?xml version='1.0' encoding='utf-88'?><annotation/>",
            "line 1: encoding: unknown",
        ),
        (
            "<?xml version='1.0' encoding='rot13'?><annotation/>",
            "line 1: encoding: 'rot13'",
        ),
        (xml(thing(name="")), "a.xml line 3: an object without a name"),
        (xml(thing(box=("x", 1, 2, 3))), "a.xml line 5: cat has a box that is not four finite numbers"),
        (xml(thing(box=("nan", 1, 2, 3))), "a box that is not four finite numbers"),  # D26
        (xml(thing(box=(1, 2, "inf", 3))), "a box that is not four finite numbers"),  # D26
        (xml("<object><name>cat</name></object>"), "a.xml line 3: cat has no bndbox"),
        (xml(thing(difficult="maybe")), "difficult is 'maybe', expected 0 or 1"),
        (xml(size="<size><width>64</width><height>x</height></size>"), "line 2: height and width are not"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(folder, text, told):  # D32
    assert told in refusal(folder({"a": text}), "train")


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_missing_size_is_read_from_the_image(folder, size):
    images = voc(folder({"a": xml(thing(), size=size)}), "train")
    assert images.pictures[0][3:] == (48, 64)
    assert images[0]["boxes"].tolist() == [[10, 5, 30, 20]]


@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG"])
def test_boxes_turn_with_a_rotated_image_of_unstated_size(folder, pixels, kind):  # D32
    root = folder({"a": xml(thing(box=(17, 9, 48, 24)), size="")})
    (root / "JPEGImages/a.jpg").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(pixels(40, 60))
    picture.save(root / f"JPEGImages/a.{kind.lower()}", kind, exif=exif)
    images = voc(root, "train")
    assert images.pictures[0][3:] == (40, 60)  # as it is stored
    assert images[0]["image"].shape == (3, 60, 40)
    assert images[0]["boxes"].tolist() == [[16, 16, 32, 48]]


def test_missing_files_are_named(folder):  # D32
    root = folder({"a": xml(thing()), "b": xml(thing())})
    (root / "Annotations/a.xml").unlink()
    (root / "JPEGImages/b.jpg").unlink()
    told = refusal(root, "train")
    assert f"{root}/Annotations/a.xml: No such file or directory" in told
    assert f"train.txt line 2: there is no image b in {root}/JPEGImages" in told
    assert refusal(root, "val").endswith("ImageSets/Main/val.txt: No such file or directory")
    assert refusal(root / "no", "val").endswith("JPEGImages: No such file or directory")


def test_a_list_of_images_may_have_a_second_column_but_no_duplicate(folder):
    root = folder({"a": xml(thing()), "b": xml()})
    (root / "ImageSets/Main/cat_train.txt").write_text("a  1\nb -1\n")
    assert len(voc(root, "cat_train")) == 2
    (root / "ImageSets/Main/train.txt").write_text("a\nb\na\n")
    assert refusal(root, "train").endswith("train.txt line 3: duplicate a")
    (root / "ImageSets/Main/train.txt").write_text("\n")
    assert refusal(root, "train").endswith("lists no image")


def test_image_names_may_contain_spaces(folder):
    root = folder({"my pic": xml(thing()), "my": xml(), "my pic 1": xml(thing("dog"))})
    assert [picture.name for picture in voc(root, "train").pictures] == ["my pic", "my", "my pic 1"]
    (root / "ImageSets/Main/cat_train.txt").write_text("my pic  1\nmy -1\nmy pic 1 -1\n")
    assert [picture.name for picture in voc(root, "cat_train").pictures] == ["my pic", "my", "my pic 1"]
    (root / "ImageSets/Main/train.txt").write_text("your pic\n")
    assert "there is no image your pic in" in refusal(root, "train")


def test_filename_decides_between_two_images_of_one_name(folder, encoded, pixels):
    root = folder({"a": xml("<filename>a.jpg</filename>", thing())})
    (root / "JPEGImages/a.png").write_bytes(encoded(pixels(48, 64), "PNG"))
    assert voc(root, "train").pictures[0].path.endswith("a.jpg")
    for text in (xml("<filename>b.jpg</filename>", thing()), xml(thing())):
        (root / "Annotations/a.xml").write_text(text)
        assert refusal(root, "train") == (
            f"{root}/Annotations/a.xml line 1: its image may be a.jpg or a.png, and no filename says which"
        )
        with pytest.raises(DataError, match=r"its image may be a\.jpg or a\.png"):
            annotated(root)


def test_an_empty_list_of_folders_is_refused():
    with pytest.raises(InputError, match="got none"):
        voc([], "train")


def test_the_line_of_an_element_is_that_of_its_start_tag(tmp_path):
    (tmp_path / "x.xml").write_text("<annotation>\n\n<b>1 &amp;\n2</b>\n<c/></annotation>", encoding="utf-8")
    root = parse(tmp_path / "x.xml")
    assert [(node.tag, node.line, node.text) for node in root.children] == [("b", 3, "1 &\n2"), ("c", 5, "")]


def test_real_annotations_are_read_and_two_degenerate_boxes_dropped(shared_data, tmp_path):  # D25
    import zipfile

    with zipfile.ZipFile(shared_data / "bccd.zip") as archive:
        archive.extractall(tmp_path)
    root = tmp_path / "bccd"
    train, test = voc(root, "trainval"), voc(root, "test")
    assert (len(train), len(test), train.classes) == (292, 72, ["Platelets", "RBC", "WBC"])
    kept = sum(images.count(i) for images in (train, test) for i in range(len(images)))
    assert kept == 4888 - 2
    assert [note.split(";")[0] for note in train.notes + test.notes] == [
        "2 times: a box has no width or no height: dropped"
    ]
    sample = train[0]
    assert sample["image"].shape == (3, 480, 640)
    assert (sample["boxes"][:, 2:] > sample["boxes"][:, :2]).all()
    assert math.isclose(sample["boxes"].max(), sample["boxes"].clamp(0, 640).max())
