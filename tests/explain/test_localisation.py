"""Every measure on maps whose score can be said beforehand."""

import pytest
import torch
from torch import nn

from cbam.errors import InputError, NonFiniteError
from cbam.explain import energy_inside
from cbam.explain.localisation import (
    box_area,
    centre_prior,
    deletion_insertion,
    energy,
    overlap,
    pointing,
    untrained,
)

BOX = [(2, 4, 6, 8)]  # 4 x 4 of 10 x 10


@pytest.fixture
def area():
    return box_area(BOX, 10, 10)[None]


def spot(y: int, x: int) -> torch.Tensor:
    heat = torch.zeros(1, 10, 10)
    heat[0, y, x] = 1
    return heat


def test_an_area_is_the_share_of_each_pixel_that_is_covered():
    area = box_area([(0.5, 0, 2, 1), (-5, -5, 1, 0.5)], 3, 3)
    assert area.tolist() == [[0.5, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert box_area([], 3, 3).sum() == 0
    assert box_area([(50, 50, 60, 60)], 3, 3).sum() == 0
    with pytest.raises(InputError, match="ends before it starts"):
        box_area([(2, 0, 1, 1)], 3, 3)


def test_pointing_is_1_on_the_object_and_0_off_it(area):
    assert pointing(spot(4, 2), area).item() == 1
    assert pointing(spot(7, 5), area).item() == 1
    assert pointing(spot(8, 5), area).item() == 0
    assert pointing(spot(4, 1), area).item() == 0


def test_a_map_without_a_preference_points_as_a_guess_would(area):
    for value in (0.0, 1.0):
        assert pointing(torch.full((1, 10, 10), value), area).item() == pytest.approx(0.16)
        assert energy(torch.full((1, 10, 10), value), area).item() == pytest.approx(0.16)
    assert pointing(spot(4, 2) + spot(0, 0), area).item() == 0.5


def test_energy_is_the_share_on_the_object(area):
    assert energy(3 * spot(5, 5) + spot(0, 0), area).item() == pytest.approx(0.75)
    assert energy(spot(5, 5) - 9 * spot(0, 0), area).item() == 1  # negative values are no energy
    maps = torch.rand(5, 10, 10)
    boxes = torch.tensor(BOX).repeat(5, 1)
    torch.testing.assert_close(energy(maps, area.expand(5, -1, -1)), energy_inside(maps, boxes))


def test_overlap_is_1_for_the_object_itself_and_known_for_a_shifted_copy(area):
    assert overlap(area.float(), area).unique().tolist() == [1]
    shifted = box_area([(4, 4, 8, 8)], 10, 10)[None].float()
    assert overlap(shifted, area)[0, 0].item() == pytest.approx(8 / 24)
    assert overlap(spot(5, 5), area)[0, 50].item() == pytest.approx(1 / 16)


def test_the_threshold_is_a_share_of_the_largest_value(area):
    heat = area.float() + 0.5 * spot(0, 0)  # 17 pixels down to one half, 16 above it
    scores = overlap(7 * heat, area, torch.tensor([0.4, 0.5, 0.6]))
    torch.testing.assert_close(scores[0].float(), torch.tensor([16 / 17, 16 / 17, 1]))


def test_batched_measures_equal_single_image_measures():
    maps, areas = torch.rand(4, 10, 10), torch.stack([box_area([(i, 0, i + 3, 5)], 10, 10) for i in range(4)])
    for measure in (pointing, energy, overlap):
        whole = measure(maps, areas)
        for i in range(4):
            assert torch.equal(whole[i], measure(maps[i : i + 1], areas[i : i + 1])[0])


class Corner(nn.Module):
    """Two classes; the first is as probable as the upper left quarter of the image is bright."""

    def forward(self, x):
        bright = x[:, :, :8, :8].mean((1, 2, 3)).clamp(0.01, 0.99)
        return torch.stack([bright, 1 - bright], 1).log()


@pytest.fixture
def corner():
    image = torch.zeros(3, 16, 16)
    image[:, :8, :8] = 1
    return image


def test_deletion_is_small_and_insertion_large_for_what_the_network_needs(corner):
    """By hand: of 256 pixels the 64 that matter come first, in the middle, or last."""
    right, wrong = corner[0], 1 - corner[0]
    deleted, inserted = deletion_insertion(Corner(), corner, right, 0, steps=4)
    # After a quarter of the pixels all are gone: 0.99, then the mean colour 0.25; steps of 1/4.
    assert deleted == pytest.approx(((0.99 + 0.25) / 2 + 3 * 0.25) / 4, abs=1e-5)
    deleted, late = deletion_insertion(Corner(), corner, wrong, 0, steps=4)
    assert deleted == pytest.approx((3 * 0.99 + (0.99 + 0.25) / 2) / 4, abs=1e-5)
    # The blurred quarter keeps part of its light: it is all there from the first step on, or at the last.
    start = 8 * (inserted - 3.5 * 0.99 / 4)
    assert 0.5 < start < 0.99
    assert late == pytest.approx((0.5 * start + 3 * start + 0.5 * 0.99) / 4, abs=1e-5)


def test_more_steps_bring_the_area_nearer_to_the_curve(corner):
    """The curve of the deletion falls in a straight line to 0.25 over the first quarter."""
    exact = 0.25 * (0.99 + 0.25) / 2 + 0.75 * 0.25
    deleted, _ = deletion_insertion(Corner(), corner, corner[0], 0, steps=64)
    assert deleted == pytest.approx(exact, abs=0.003)


def test_judging_leaves_the_network_and_the_image_as_they_were(build):
    model, image = build().train(), torch.rand(3, 32, 32)
    before = image.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    deletion_insertion(model, image, torch.rand(32, 32), 1)
    assert torch.equal(image, before[0])
    assert model.training
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())


def test_the_centre_prior_is_largest_in_the_middle_and_even_about_it():
    prior = centre_prior(8, 12)
    assert prior.shape == (8, 12)
    assert torch.allclose(prior, prior.flip(0))
    assert torch.allclose(prior, prior.flip(1))
    assert prior.argmax().item() in {12 * y + x for y in (3, 4) for x in (5, 6)}
    assert prior[0, 0] < prior[0, 6] < prior[4, 6]


def test_an_untrained_copy_has_new_weights_and_the_model_is_unchanged(build):
    torch.manual_seed(5)
    model, images = build(), torch.randn(4, 3, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fresh, again = untrained(model, images), untrained(model, images)
    assert not fresh.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(fresh.stem.weight, model.stem.weight)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in fresh.state_dict().items())
    assert fresh.stage1.bn.running_var.std() > 0


class Scaled(nn.Module):
    """A convolution with a factor per channel, which is the module's own as in a ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 1)
        self.gamma = nn.Parameter(2 + torch.randn(64))
        self.one = nn.Parameter(torch.full((64,), 1e-6))

    def forward(self, x):
        return self.one[:, None, None] + self.gamma[:, None, None] * self.conv(x)


def test_weights_that_no_layer_can_reset_are_redrawn():
    model = Scaled()
    fresh = untrained(model, torch.randn(2, 3, 8, 8))
    assert not torch.isclose(fresh.gamma, model.gamma).any()
    assert fresh.gamma.mean().item() == pytest.approx(model.gamma.mean().item(), abs=0.5)
    assert fresh.gamma.std().item() == pytest.approx(model.gamma.std().item(), abs=0.5)
    torch.testing.assert_close(fresh.one, model.one)  # alike for all channels: nothing was learned


def test_mismatched_or_nan_maps_are_refused(area):
    with pytest.raises(InputError, match="maps and areas"):
        pointing(torch.zeros(1, 9, 10), area)
    with pytest.raises(NonFiniteError):
        energy(torch.full((1, 10, 10), torch.nan), area)
