"""Mixup and CutMix: shares that add up, drawn from the position in the run only."""

import pytest
import torch

from cbam.train import Recipe
from cbam.train.mixing import mix

IMAGES = torch.stack([torch.full((3, 16, 20), float(i)) for i in range(6)])


def test_a_batch_is_unchanged_without_mixup_and_cutmix():
    mixed = mix(IMAGES, Recipe(), (0, 0, 0))
    assert mixed.image is IMAGES
    assert mixed.share == 1


@pytest.mark.parametrize("step", range(5))
def test_mixup_is_a_weighted_sum_with_the_batch_reversed(step):
    mixed = mix(IMAGES, Recipe(mixup=0.5), (3, 1, step))
    torch.testing.assert_close(mixed.image, mixed.share * IMAGES + (1 - mixed.share) * IMAGES.flip(0))
    assert 0 <= mixed.share <= 1


@pytest.mark.parametrize("step", range(20))
def test_cutmix_pastes_a_box_of_the_other_image_and_the_share_is_the_area_left(step):
    mixed = mix(IMAGES, Recipe(cutmix=1.0), (3, 1, step))
    for index in range(6):
        own = mixed.image[index, 0] == index
        assert own.float().mean().item() == pytest.approx(mixed.share, abs=1e-6)
        rows, columns = (~own).any(1), (~own).any(0)
        assert (~own).sum() == rows.sum() * columns.sum()  # one box
        assert set(mixed.image[index].unique().tolist()) <= {float(index), float(5 - index)}


def test_the_draw_depends_only_on_the_step_and_both_kinds_occur():
    recipe = Recipe(mixup=0.5, cutmix=1.0)
    drawn = [mix(IMAGES, recipe, (0, 0, step)) for step in range(30)]
    again = [mix(IMAGES, recipe, (0, 0, step)) for step in range(30)]
    assert all(torch.equal(a.image, b.image) for a, b in zip(drawn, again, strict=True))
    whole = [(mixed.image[0, 0] % 1 == 0).all().item() for mixed in drawn]
    assert 5 < sum(whole) < 25
    assert len({mixed.share for mixed in drawn}) > 20
