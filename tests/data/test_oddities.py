"""Images that are read, but may be unintended, are counted once, in the notes (rows D7, D11)."""

import numpy as np
import pytest
from PIL import Image

from cbam.data import folder as room
from cbam.data import image_folder


@pytest.fixture
def pictures(make_folder):
    make_folder({"cat": 4, "dog": 4}, inside="train")
    return make_folder({"cat": 2, "dog": 2}, inside="val")


def frames(encoded, kind, count=3):
    """An animation of `count` plain frames, all different."""
    first, *more = (Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)) for i in range(count))
    return encoded(first, kind, save_all=True, append_images=more)


@pytest.mark.parametrize(
    ("kind", "ending"), [("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif")]
)
def test_animations_are_counted_and_read_by_their_first_frame(pictures, encoded, kind, ending):  # D7
    for name in ("x", "y"):
        (pictures / f"train/cat/{name}.{ending}").write_bytes(frames(encoded, kind))
    (pictures / f"val/dog/x.{ending}").write_bytes(frames(encoded, kind))
    train, val = image_folder(pictures)
    told = "with several frames, of which only the first is used; the first: "
    assert [note for note in train.notes if "frames" in note] == [
        f"training: 2 images {told}{pictures}/train/cat/x.{ending}"
    ]
    assert [note for note in val.notes if "frames" in note] == [
        f"validation: 1 image {told}{pictures}/val/dog/x.{ending}"
    ]
    assert val[val.targets.index(1) + 2]["image"].float().mean() < 3


@pytest.mark.parametrize(
    ("kind", "ending"), [("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif")]
)
def test_an_image_of_one_frame_is_not_counted_as_an_animation(pictures, encoded, kind, ending):  # D7
    (pictures / f"train/cat/x.{ending}").write_bytes(frames(encoded, kind, 1))
    train, _ = image_folder(pictures)
    assert not any("frames" in note for note in train.notes)


@pytest.mark.parametrize(
    ("height", "width", "odd"), [(1, 1, 1), (9, 40, 1), (10, 40, 0), (12, 121, 1), (120, 12, 0), (20, 900, 1)]
)
def test_tiny_and_narrow_images_are_counted_and_read(pictures, encoded, height, width, odd):  # D11
    (pictures / "train/dog/x.png").write_bytes(encoded(np.zeros((height, width, 3), np.uint8)))
    train, val = image_folder(pictures)
    notes = [note for note in [*train.notes, *val.notes] if "below 10 pixels" in note]
    assert len(notes) == odd
    if odd:
        assert notes[0].startswith("training: 1 image below 10 pixels on a side, or more than 10 times")
        assert notes[0].endswith("x.png")
    assert train[len(train) - 1]["image"].shape == (3, 32, 32)


def test_the_note_on_a_large_set_says_how_many_images_were_inspected(pictures, encoded, monkeypatch):  # D11
    monkeypatch.setattr(room, "PEEKS", 5)
    (pictures / "train/cat/0.jpg").write_bytes(encoded(np.zeros((4, 4, 3), np.uint8), "JPEG"))
    train, _ = image_folder(pictures)
    assert any("(of 4 inspected)" in note for note in train.notes)


def test_an_ordinary_set_has_no_notes_on_odd_images(pictures):  # D7, D11
    train, val = image_folder(pictures)
    assert not any("first:" in note for note in [*train.notes, *val.notes])
