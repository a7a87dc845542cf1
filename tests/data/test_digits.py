import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from cbam.data import cluttered_digits
from cbam.errors import InputError


@pytest.fixture(scope="module")
def originals():
    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8) * (255 / 16), labels


def test_the_sets_are_the_first_1437_digits_and_three_compositions_of_the_last_360(digits, originals):
    train, val = digits
    assert (len(train), len(val)) == (1437, 1080)
    assert train.targets == originals[1][:1437].tolist()
    assert val.targets == np.repeat(originals[1][1437:], 3).tolist()
    assert train.classes == [str(i) for i in range(10)]
    assert train.has_boxes
    assert val.has_boxes


@pytest.mark.parametrize("split", [0, 1])
def test_a_sample_is_grey_64_by_64_with_its_box(digits, split):
    for index in range(0, 1000, 50):
        sample = digits[split][(1, index)]
        image, box = sample["image"], sample["box"]
        assert image.shape == (3, 64, 64)
        assert image.dtype == torch.uint8
        assert torch.equal(image[0], image[1])
        assert torch.equal(image[0], image[2])
        assert box.dtype == torch.float32
        assert sample["index"] == index


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 1436), epoch=st.integers(0, 100_000), seed=st.integers(0, 2**32 - 1))
def test_a_box_lies_inside_and_has_the_size_of_a_digit(digits, index, epoch, seed):
    sample = digits[0].seeded(seed)[(epoch, index)]
    x0, y0, x1, y1 = sample["box"].int().tolist()
    assert 0 <= x0 < x1 <= 64
    assert 0 <= y0 < y1 <= 64
    assert 14 <= y1 - y0 <= 32, "all digits are about as high as their square"
    assert 4 <= x1 - x0 <= 32


def test_the_box_is_tight_around_the_enlarged_digit(digits, originals):
    """Without clutter, the ink is where the box says and nowhere else."""
    train, _ = digits
    for index in range(40):
        canvas = np.zeros((64, 64), np.float32)
        x0, y0, x1, y1 = train._add_digit(canvas, index, np.random.default_rng(index))
        rows, columns = np.where(canvas > 64)
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)
        assert canvas.max() == pytest.approx(originals[0][index].max(), rel=0.25)


def test_the_box_contains_its_own_digit(digits, originals):
    """The original, enlarged to its box' height, correlates better with its content than other digits do."""
    _, val = digits
    right = 0
    for index in range(0, 300, 3):
        sample = val[index]
        x0, y0, x1, y1 = sample["box"].int().tolist()
        seen = sample["image"][:1, y0:y1, x0:x1].float()[None]
        seen = torch.nn.functional.interpolate(seen, (8, 6), mode="area").flatten()
        candidates = []
        for digit in originals[0][1437 : 1437 + 100]:
            ink = digit > 64
            tight = digit[np.ix_(ink.any(1), ink.any(0))]
            tight = torch.from_numpy(tight).float()[None, None]
            candidates.append(torch.nn.functional.interpolate(tight, (8, 6), mode="bilinear").flatten())
        scores = [torch.corrcoef(torch.stack([seen, c]))[0, 1].item() for c in candidates]
        right += scores.index(max(scores)) == index // 3
    assert right > 60


def test_training_and_validation_digits_are_never_mixed(monkeypatch):
    """With every validation digit white and every training digit dark, no split shows the other's."""
    import sklearn.datasets

    pixels = np.full((1797, 64), 9.0)
    pixels[1437:] = 16.0
    labels = np.arange(1797) % 10
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda return_X_y: (pixels, labels))
    train, val = cluttered_digits()
    for i in range(200):
        assert set(train[(i, i)]["image"].unique().tolist()) == {0, 143}
        assert set(val[i]["image"].unique().tolist()) == {0, 255}


def test_clutter_comes_from_other_classes(monkeypatch):
    """With one class grey and the others white, only the target is grey, and it is inside its box."""
    import sklearn.datasets

    labels = np.arange(1797) % 10
    pixels = np.where(labels[:, None] == 3, 9.0, 16.0).repeat(64, 1)
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda return_X_y: (pixels, labels))
    train, _ = cluttered_digits()
    for index in range(3, 300, 10):
        sample = train[index]
        image, (x0, y0, x1, y1) = sample["image"][0], sample["box"].int().tolist()
        assert set(image.unique().tolist()) == {0, 143, 255}
        image[y0:y1, x0:x1] = 0
        assert set(image.unique().tolist()) <= {0, 255}


def test_training_is_recomposed_each_epoch_and_validation_is_not(digits):
    train, val = digits
    assert not torch.equal(train[(0, 5)]["image"], train[(1, 5)]["image"])
    assert torch.equal(val[(0, 5)]["image"], val[(9, 5)]["image"])
    assert torch.equal(val.seeded(3)[5]["image"], val[5]["image"])
    assert len({val[i]["image"].numpy().tobytes() for i in range(30)}) == 30


def test_a_composition_is_a_function_of_the_seeds_the_epoch_and_the_index(digits):
    again, other = cluttered_digits(), cluttered_digits(1)
    np.random.seed(3)
    for split in (0, 1):
        assert torch.equal(again[split][(2, 7)]["image"], digits[split][(2, 7)]["image"])
        assert not torch.equal(other[split][(2, 7)]["image"], digits[split][(2, 7)]["image"])


def test_positions_are_spread_over_the_image(digits):
    boxes = torch.stack([digits[0][(e, i)]["box"] for e in range(2) for i in range(0, 1437, 3)])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert (centres.mean(0) - 32).abs().max() < 1.5
    assert centres.min() < 14
    assert centres.max() > 50


def test_mean_and_std_are_those_of_the_pixels(digits):
    train, val = digits
    values = torch.stack([val[i]["image"][0] for i in range(0, 1080, 4)]).float() / 255
    assert train.mean == val.mean
    assert train.std == val.std
    assert train.mean[0] == pytest.approx(values.mean().item(), rel=0.05)
    assert train.std[0] == pytest.approx(values.std().item(), rel=0.05)


def test_a_sample_costs_under_half_a_millisecond(digits):
    """CPU time, since the machine may be busy; an idle core takes about 0.08 ms."""
    best = float("inf")
    for epoch in range(5):
        start = time.process_time()
        for index in range(200):
            digits[0].sample(epoch, index)
        best = min(best, (time.process_time() - start) / 200)
    assert best < 5e-4


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "0", None])
def test_an_invalid_seed_is_refused(seed):
    with pytest.raises(InputError, match="seed must be an integer from 0"):
        cluttered_digits(seed)
