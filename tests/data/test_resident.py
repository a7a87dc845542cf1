"""Images that stay on a device: the same as the loader's, except where they are made."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cbam.data import Resident, cluttered_digits, image_folder, loader
from cbam.data.resident import AREA, RATIO, crop_and_flip, draw_crops
from cbam.errors import DataError
from cbam.models import build
from cbam.train import Recipe, fit

SIZE = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        for label in range(3):
            for i in range(count):
                path = root / split / f"class{label}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                height, width = 30 + 4 * (i % 3), 30 + 4 * (i % 2)
                Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def train(folder):
    return Resident(image_folder(folder, size=SIZE)[0], "cpu", augment=True)


def test_a_crop_is_cut_first_and_then_enlarged():
    pictures = torch.randint(0, 256, (40, 3, SIZE, SIZE), dtype=torch.uint8)
    crops = torch.from_numpy(draw_crops(3, 1, 40, SIZE))
    made = crop_and_flip(pictures, crops)
    assert made.dtype == torch.uint8
    for picture, (top, left, height, width, flip), found in zip(pictures, crops.tolist(), made, strict=True):
        cut = picture[:, top : top + height, left : left + width].float()
        wanted = F.interpolate(cut[None], size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0]
        wanted = wanted.flip(2) if flip else wanted
        assert (found.float() - wanted).abs().max() <= 0.51


def test_a_crop_of_the_whole_image_is_bit_identical():
    pictures = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8)
    whole = torch.tensor([[0, 0, SIZE, SIZE, 0]]).expand(5, 5)
    assert torch.equal(crop_and_flip(pictures, whole), pictures)
    mirrored = torch.tensor([[0, 0, SIZE, SIZE, 1]]).expand(5, 5)
    assert torch.equal(crop_and_flip(pictures, mirrored), pictures.flip(3))


def test_crops_lie_inside_and_follow_random_resized_crop():
    crops = draw_crops(0, 0, 20_000, 96)
    top, left, height, width, flip = crops.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 96).all()
    assert (left + width <= 96).all()
    ratio, area = width / height, width * height / 96**2
    assert ratio.min() > RATIO[0] - 0.05
    assert ratio.max() < RATIO[1] + 0.06
    assert AREA[0] - 0.01 < area.min() < 0.09
    assert abs(flip.mean() - 0.5) < 0.02
    # torchvision's own draws: mean area and mean of |log ratio|
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    blank = torch.zeros(3, 96, 96)
    theirs = np.array([RandomResizedCrop.get_params(blank, [*AREA], [*RATIO]) for _ in range(2_000)])
    assert area.mean() == pytest.approx((theirs[:, 2] * theirs[:, 3]).mean() / 96**2, abs=0.02)
    assert np.abs(np.log(ratio)).mean() == pytest.approx(
        np.abs(np.log(theirs[:, 3] / theirs[:, 2])).mean(), abs=0.01
    )
    assert top.mean() == pytest.approx(theirs[:, 0].mean(), abs=1.2)


def test_a_crop_is_a_function_only_of_seed_epoch_and_index():
    # D34
    few, many = draw_crops(5, 2, 10, 96), draw_crops(5, 2, 1000, 96)
    assert (many[:10] == few).all()
    assert (draw_crops(5, 3, 10, 96) != few).any()
    assert (draw_crops(6, 2, 10, 96) != few).any()


def test_a_batch_has_the_samples_of_its_indices(train):
    # D34
    for size in (6, 9):
        batches = loader(train, size, train=True, seed=7)
        batches.sampler.set_epoch(2)
        seen = []
        own = train.seeded(7)
        for batch in batches:
            for image, target, index in zip(batch["image"], batch["target"], batch["index"], strict=True):
                sample = own[(2, int(index))]
                assert torch.equal(image, sample["image"])
                assert int(target) == sample["target"]
                seen.append(int(index))
        assert sorted(seen) == list(range(len(train)))


def test_the_order_is_that_of_the_ordinary_loader(folder, train):
    ordinary = loader(image_folder(folder, size=SIZE)[0], 4, train=True, seed=3)
    resident = loader(train, 4, train=True, seed=3)
    assert len(ordinary) == len(resident)
    for epoch in range(2):
        for batches in (ordinary, resident):
            batches.sampler.set_epoch(epoch)
        pairs = zip(ordinary, resident, strict=True)
        assert all(torch.equal(one["index"], other["index"]) for one, other in pairs)


def test_validation_images_are_those_of_the_ordinary_set(folder):
    val = image_folder(folder, size=SIZE)[1]
    resident = Resident(val, "cpu", augment=False)
    for one, other in zip(loader(val, 4, train=False), loader(resident, 4, train=False), strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["target"], other["target"])
        assert torch.equal(one["index"], other["index"])


def test_a_last_batch_of_one_image_is_left_out_of_training(train):
    # 21 images
    assert [len(batch["index"]) for batch in loader(train, 5, train=True)] == [5, 5, 5, 5]
    assert len(loader(train, 5, train=True)) == 4
    assert [len(batch["index"]) for batch in loader(train, 5, train=False)] == [5, 5, 5, 5, 1]
    assert len(loader(train, 5, train=False)) == 5


def test_training_on_a_resident_set_is_repeatable(folder, train):
    val = Resident(image_folder(folder, size=SIZE)[1], "cpu", augment=False)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build("resnet_tiny", num_classes=3)
        history = fit(model, train, val, Recipe(epochs=2, batch_size=8), seed=1, device="cpu")
        found.append([model.fc.weight.detach().clone(), [entry["train_loss"] for entry in history]])
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_subset_can_be_resident(folder):
    few = image_folder(folder, size=SIZE)[0].subset(6)
    assert len(Resident(few, "cpu", augment=True)) == 6


def test_images_generated_in_every_epoch_are_refused():
    with pytest.raises(DataError, match="cluttered_digits generates new images in every epoch"):
        Resident(cluttered_digits()[0], "cpu", augment=True)
