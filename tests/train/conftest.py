"""A small task that trains in a second."""

import pytest
import torch

import cbam
from cbam.data import cluttered_digits


@pytest.fixture(scope="session")
def digits():
    """40 or so training and validation pictures each, all ten classes."""
    return tuple(images.subset(40) for images in cluttered_digits())


@pytest.fixture
def network():
    torch.manual_seed(0)
    return cbam.build("resnet_tiny", num_classes=10)
