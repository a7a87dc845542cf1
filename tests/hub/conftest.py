import copy

import pytest
import torch

import cbam
from cbam.hub import Card

CARD = Card(
    classes=tuple("abcde"),
    size=32,
    data="cluttered digits",
    recipe={"epochs": 3, "rate": 0.05},
    results={"top-1 error, %": 3.25},
    licence="mit",
    about="A small one.",
)


@pytest.fixture(scope="session")
def built():
    """Attaching takes most of the time of most of these tests."""
    torch.manual_seed(2)
    made = cbam.attach(cbam.build("resnet_tiny", num_classes=5))  # identity start: its gains are not 1
    for block in cbam.surgery.attached(made).values():
        torch.nn.init.normal_(block.spatial.bn.weight)
        block.spatial.bn.num_batches_tracked += 3
    return made


@pytest.fixture
def model(built):
    return copy.deepcopy(built)


@pytest.fixture
def folder(model, tmp_path):
    return cbam.save_pretrained(model, tmp_path / "mine", network="resnet_tiny+cbam", card=CARD)
