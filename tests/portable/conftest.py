import pytest
import torch

from cbam.models import build


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny():
    """A small network with attention whose gates are neither open nor shut."""
    model = build("resnet_tiny+cbam", num_classes=10)
    for name, parameter in model.named_parameters():
        if "cbam" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model
