"""The average of a network whose modules share weights (row K24)."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cbam.train import Recipe, fit
from cbam.train.average import Average


class Tied(nn.Module):
    """Two names for one convolution and its norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.first = self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 10)

    def forward(self, input):
        return self.fc(self.second(self.first(self.stem(input).relu()).relu()).mean((2, 3)))


def bits(tensors: dict) -> dict:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_shared_weights_are_swapped_with_their_average_and_back():
    # K24
    model = Tied()
    average = Average(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update()
    weights, averaged = bits(model.state_dict()), bits(average.tensors)
    assert torch.equal(averaged["first.0.weight"], averaged["second.0.weight"])
    assert not torch.equal(weights["first.0.weight"], averaged["first.0.weight"])
    average.swap()
    assert same(model.state_dict(), averaged)
    assert same(average.tensors, weights)
    average.swap()
    assert same(model.state_dict(), weights)
    assert same(average.tensors, averaged)


class Counted(TorchDispatchMode):
    """Counts operations: each is a launch on a GPU, or several."""

    operations = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.operations += 1
        return function(*arguments, **(named or {}))


def test_averaging_takes_as_many_operations_for_a_deeper_network():
    counts = []
    for depth in (1, 8):
        model = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(depth)))
        average = Average(model, 0.9)
        with Counted() as counted:
            model[0].num_batches_tracked += 3
            average.update()
        counts.append(counted.operations)
        assert average.tensors["0.num_batches_tracked"] == 3
    assert counts[0] == counts[1]


def test_a_network_with_shared_weights_trains_alike_with_and_without_an_average(digits):
    # K24
    recipe = {"epochs": 2, "batch_size": 16, "lr": 0.3, "schedule": "constant"}
    without, averaged = (
        fit(Tied(), *digits, Recipe(**recipe, ema=decay), seed=0, device="cpu") for decay in (0.0, 0.99)
    )
    assert [e["train_loss"] for e in averaged] == pytest.approx([e["train_loss"] for e in without], rel=1e-6)
    assert averaged[-1]["val_loss"] != without[-1]["val_loss"]
