"""Attached weights are trained and averaged, although they were added later."""

import pytest
import torch

import cbam
from cbam.train.average import Average
from cbam.train.optimizer import make_optimizer, parameter_groups
from cbam.train.recipes import recipe


# S9
@pytest.mark.parametrize("name", ["digits", "imagenet/modern", "imagenet/finetune"])
def test_every_weight_of_the_attention_is_in_the_optimizer_once(name):
    model = cbam.attach(cbam.build("resnet_tiny"))
    settings = recipe(name).training()
    optimizer = make_optimizer(settings, parameter_groups(settings, model))
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


# S9
def test_every_weight_of_the_attention_is_averaged():
    model = cbam.attach(cbam.build("resnet_tiny"))
    average = Average(model, 0.5)
    assert set(average.tensors) == set(model.state_dict())
    before = {name: value.clone() for name, value in average.tensors.items() if ".cbam." in name}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    average.update()
    moved = [
        n
        for n, _ in model.named_parameters()
        if ".cbam." in n and not torch.equal(average.tensors[n], before[n])
    ]
    assert moved == [name for name, _ in model.named_parameters() if ".cbam." in name]
