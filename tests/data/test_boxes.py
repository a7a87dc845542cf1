"""Boxes turn with their image, and a set of them works with the loader."""

import numpy as np
import pytest
import torch
from PIL import Image

from cbam.data import BoxedImages
from cbam.data.boxes import Picture, Thing, turned
from cbam.errors import DataError, InputError

BOX = (8, 4, 24, 12)  # x0 y0 x1 y1, on the stored image of 32 x 48


@pytest.fixture
def rotated(tmp_path, encoded):
    """rotated(orientation, kind, stated size) -> a set of one image, white where its box is."""

    def make(orientation, kind="PNG", size=(32, 48), box=BOX):
        pixels = np.zeros((32, 48, 3), np.uint8)
        x0, y0, x1, y1 = BOX
        pixels[y0:y1, x0:x1] = 255
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{kind.lower()}"
        path.write_bytes(encoded(pixels, kind, exif=exif))
        picture = Picture(1, "x", str(path), *size)
        return BoxedImages("x", ["white"], [picture], [Thing(0, box, 1, 128.0)])

    return make


def white(image):
    ys, xs = np.nonzero(image[0].numpy() > 127)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_turns_with_its_image(rotated, orientation, kind):  # D6
    sample = rotated(orientation, kind)[0]
    height, width = (32, 48) if orientation < 5 else (48, 32)
    assert sample["image"].shape == (3, height, width)
    assert sample["boxes"].tolist() == [white(sample["image"])]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_box_on_the_upright_image_stays(rotated, orientation):  # D6
    """The stated size shows that the image was labelled as a viewer shows it."""
    upright = turned(np.array([BOX], float), orientation, 32, 48)[0]
    sample = rotated(orientation, size=(48, 32), box=tuple(upright))[0]
    assert sample["boxes"].tolist() == [white(sample["image"])]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_an_image_is_opened_once_for_its_pixels_and_its_orientation(rotated, kind, monkeypatch):
    """For a PNG, Pillow has to decode all pixels to find the orientation."""
    images, opened, whole = rotated(6, kind), [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: (opened.append(1), whole(*a, **k))[1])
    assert images[0]["boxes"].tolist() == [white(images[0]["image"])]
    assert len(opened) == 2


def test_a_stated_size_that_fits_neither_orientation_is_refused(rotated):  # D6
    with pytest.raises(DataError, match="48x32 pixels, but its annotation says 48x33"):
        rotated(6, size=(33, 48))[0]


def test_an_invalid_orientation_turns_nothing(rotated):  # D6
    assert rotated(9)[0]["boxes"].tolist() == [list(BOX)]


def test_objects_are_sorted_by_image(rotated):
    one = rotated(1).pictures[0]
    things = [Thing(2, (0, 0, 3, 3), 2, 9.0, crowd=True), Thing(0, BOX, 1, 1.0), Thing(2, BOX, 1, 2.0)]
    images = BoxedImages("x", ["a", "b"], [one, one, one], things)
    assert [images.count(i) for i in range(3)] == [1, 0, 2]
    assert images[2]["labels"].tolist() == [2, 1]
    assert images[2]["crowd"].tolist() == [True, False]
    few = images.with_objects()
    assert [few[i]["labels"].tolist() for i in range(2)] == [[1], [2, 1]]
    assert few[1]["boxes"].tolist() == [[0, 0, 3, 3], list(BOX)]
    with pytest.raises(IndexError, match="index 3: x has 3 images"):
        images[3]
    with pytest.raises(InputError, match="n must be an integer"):
        images.subset(0)


def test_a_sample_can_be_indexed_by_epoch_and_index(rotated):
    images = rotated(1)
    assert torch.equal(images[(3, 0)]["boxes"], images[0]["boxes"])
