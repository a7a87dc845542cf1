"""Parameters and multiply-accumulates."""

import pytest
import torch
from torch import nn

from cbam.errors import InputError
from cbam.models import build, profile


@pytest.mark.parametrize(
    ("name", "gmac"),
    [("resnet_tiny", 0.1532), ("resnet18", 1.8141), ("resnet18+cbam", 1.8151), ("mobilenet_v2", 0.3008)],
)
def test_multiply_accumulates_are_the_known_ones(name, gmac):
    with torch.device("meta"):
        model = build(name)
    assert profile(model, 224).gmac == pytest.approx(gmac, abs=5e-5)


def test_a_convolution_and_a_matrix_product_are_counted_by_their_definition():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 5, 4))
    parameters, gmac = profile(model, (6, 5))
    assert parameters == 3 * 8 * 9 + 8 + 8 * 30 * 4 + 4
    assert gmac * 1e9 == pytest.approx(3 * 8 * 9 * 30 + 8 * 30 * 4)


def test_counting_leaves_the_model_as_it_was():
    model = build("resnet_tiny+cbam")
    model.layer2.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    profile(model, 32)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_when_the_model_raises():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Dropout()).train()
    with pytest.raises(RuntimeError, match="channels"):
        profile(model, 8)
    assert all(module.training for module in model.modules())


def test_a_half_precision_model_is_counted_in_its_dtype():
    assert profile(build("resnet_tiny").bfloat16(), 64) == profile(build("resnet_tiny"), 64)


@pytest.mark.parametrize("size", [0, -3, 2.5, True, (8, 0), "224", (), (8,), (3, 8, 8)])
def test_an_invalid_size_is_refused(size):
    with pytest.raises(InputError, match="size must be a positive int"):
        profile(build("resnet_tiny"), size)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(InputError, match="no parameters"):
        profile(nn.Sequential(nn.ReLU()))
